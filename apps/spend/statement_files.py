"""Write statements and requests as CSV, piece by piece: a million rows need no more memory than two thousand.

Texts that a spreadsheet would take for a formula get an apostrophe in front. Amounts are exact: US dollars with nine decimals, and whole
nano-dollars.
"""

import csv
import io
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from django.db.models import Q

from aiscale.db import NANOUSD_PER_USD
from apps.accounts.callers import on_thread
from apps.accounts.models import ApiKey
from apps.spend import statements, usage
from apps.spend.models import UsageRecord
from apps.spend.statements import Days, UsageLine

CHUNK_ROWS = 2_000
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")

STATEMENT_COLUMNS = [
    *("date", "kind", "model", "key", "key_id", "person", "requests", "failed_requests", "prompt_tokens"),
    *("cached_tokens", "completion_tokens", "cache_hits", "saved_usd", "usd", "nanousd", "memo"),
]
REQUEST_COLUMNS = [
    *("ended_at", "request_id", "job_id", "model", "key_id", "user_id", "source", "ended", "error_code"),
    *("prompt_tokens", "cached_tokens", "completion_tokens", "usd", "nanousd", "queued_ms", "first_token_ms"),
    *("duration_ms", "price_id", "cache", "saved_usd"),
]


async def iter_statement(organization_id: str, days: Days, *, user_id: str = "") -> AsyncIterator[bytes]:
    """Yield a statement's lines, a day at a time, and its total last, with what the plan includes. I/O: three SQL statements a day, each on
    a thread, and those of `usage.find_month`."""
    yield _write([STATEMENT_COLUMNS])
    total = 0
    keys = await on_thread(lambda: _name_all_keys(organization_id))
    for day in days:
        one = Days(first=day, last=day, zone=days.zone)
        rows, sum_nanousd = await on_thread(partial(_read_day, organization_id, user_id, one, keys))
        total += sum_nanousd
        if rows:
            yield _write(rows)
    month = await on_thread(lambda: usage.find_month(organization_id, days, user_id))
    yield _write([_amount_row(f"{days.first} to {days.last}", *row) for row in _sum_up(total, month)])


async def iter_requests(organization_id: str, days: Days, *, user_id: str = "") -> AsyncIterator[bytes]:
    """Yield every request of the days, oldest first. I/O: one SQL statement for `CHUNK_ROWS` rows, each on a thread."""
    yield _write([REQUEST_COLUMNS])
    after: tuple[datetime, int] | None = None
    while True:
        chunk = await on_thread(partial(_read_requests, organization_id, user_id, days, after))
        if chunk:
            yield _write([_request_row(record) for record in chunk])
        if len(chunk) < CHUNK_ROWS:
            return
        after = chunk[-1].occurred_at, chunk[-1].pk


def format_amount(nanousd: int) -> str:
    """Write US dollars with nine decimals, for machines: ``-0.000000065``."""
    sign = "-" if nanousd < 0 else ""
    whole, part = divmod(abs(nanousd), NANOUSD_PER_USD)
    return f"{sign}{whole}.{part:09d}"


def disarm(text: str) -> str:
    """Keep a spreadsheet from running a text as a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _sum_up(total: int, month: usage.MonthSummary | None) -> list[tuple[str, int, str]]:
    """Return kind, amount and memo of the last rows: the total; for a plan that includes spending, what of it that pays, which is negative,
    and what is left to pay: the sum of the two before it."""
    if month is None or not month.included_nanousd:
        return [("total", total, "")]
    used = month.included_used(total)
    return [
        ("total", total, ""),
        ("included", -used, month.describe_included()),
        ("total beyond included", total - used, ""),
    ]


def _amount_row(date: str, kind: str, nanousd: int, memo: str) -> list[str]:
    row = ["" for _ in STATEMENT_COLUMNS]
    row[:2], row[-3:] = [date, kind], [format_amount(nanousd), str(nanousd), memo]
    return row


def _read_day(organization_id: str, user_id: str, day: Days, keys: dict[str, str]) -> tuple[list[list[str]], int]:
    lines = statements.list_usage(organization_id, day, user_id=user_id)
    people = statements.name_users(line.user_id for line in lines)
    rows = [_usage_row(line, keys, people) for line in lines]
    total = sum(line.cost_nanousd for line in lines)
    for entry in [] if user_id else statements.list_entries(organization_id, day.start, day.end):
        total += entry.amount_nanousd
        rows.append(_amount_row(f"{day.first}", entry.kind, entry.amount_nanousd, disarm(entry.memo)))
    return rows, total


def _usage_row(line: UsageLine, keys: dict[str, str], people: dict[str, str]) -> list[str]:
    return [
        f"{line.date}",
        "usage",
        disarm(line.model),
        disarm(keys.get(line.key_id, line.key_id)),
        line.key_id,
        disarm(people.get(line.user_id, line.user_id)),
        str(line.requests),
        str(line.failed_requests),
        str(line.prompt_tokens),
        str(line.cached_tokens),
        str(line.completion_tokens),
        str(line.cache_hits),
        format_amount(line.saved_nanousd),
        format_amount(line.cost_nanousd),
        str(line.cost_nanousd),
        "",
    ]


def _read_requests(
    organization_id: str, user_id: str, days: Days, after: tuple[datetime, int] | None
) -> list[UsageRecord]:
    found = statements.filter_records(organization_id, days.start, days.end, user_id=user_id)
    if after is not None:
        moment, pk = after
        found = found.filter(Q(occurred_at__gt=moment) | Q(occurred_at=moment, pk__gt=pk), occurred_at__gte=moment)
    return list(found.order_by("occurred_at", "pk")[:CHUNK_ROWS])


def _request_row(record: UsageRecord) -> list[str]:
    values: list[Any] = [
        record.occurred_at.isoformat(),
        record.request_id,
        record.job_id,
        record.model,
        record.key_id,
        record.user_id,
        record.source,
        record.finish_reason,
        record.error_code,
        record.prompt_tokens,
        record.cached_tokens,
        record.completion_tokens,
        format_amount(record.cost_nanousd),
        record.cost_nanousd,
        record.queued_ms,
        record.first_token_ms,
        record.duration_ms,
        record.price_id,
        record.cache,
        format_amount(record.saved_nanousd),
    ]
    return [disarm(value) if isinstance(value, str) else "" if value is None else str(value) for value in values]


def _name_all_keys(organization_id: str) -> dict[str, str]:
    ids = ApiKey.objects.filter(organization__public_id=organization_id).values_list("public_id", flat=True)
    return statements.name_keys(ids)


def _write(rows: Sequence[Sequence[str]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue().encode()
