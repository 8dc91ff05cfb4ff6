"""Prove that usage, ledger, totals and the gate's copies agree, on a system at rest or at work."""

import sys
from datetime import UTC, datetime
from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from django.db import DatabaseError

from aiscale.redis import UNAVAILABLE
from apps.spend import copies, periods, reconciliation
from apps.spend.reconciliation import MENDED, Difference


class Command(BaseCommand):
    help = (
        "Compare usage records, ledger, totals and the gate's copies in Redis; print what differs. Copies and totals that differ are made "
        "anew; the ledger is never touched. Ends with 1 when something differs (with --check), or still does (without)."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--check", action="store_true", help="say what differs, and change nothing")
        parser.add_argument("--all", action="store_true", help="compare the whole ledger, not just the last two months")
        parser.add_argument("--since", type=_read_day, help="compare the ledger since this day, such as 2026-11-01")
        parser.add_argument(
            "--patience",
            type=float,
            default=copies.PATIENCE_S,
            metavar="SECONDS",
            help="how long a copy may lag behind before it counts as different (default: %(default)s)",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        since = options["since"] or _begin_of_last_month()
        if options["all"]:
            since = None
        try:
            found = self._compare(since, options["patience"])
            if found and not options["check"]:
                self._mend(found)
                found = self._compare(since, options["patience"])
        except UNAVAILABLE as error:
            self.stderr.write(f"Redis does not answer: {error}")
            sys.exit(2)
        except DatabaseError as error:
            self.stderr.write(f"Postgres does not answer: {error}")
            sys.exit(2)
        if found:
            sys.exit(1)

    def _compare(self, since: datetime | None, patience_s: float) -> list[Difference]:
        ledger = reconciliation.check_ledger(since)
        gate = copies.check_copies(patience_s=patience_s)
        counts = ", ".join(f"{number:,} {name}" for name, number in (ledger.counts | gate.counts).items())
        found = ledger.differences + gate.differences
        for difference in found:
            self.stdout.write(str(difference))
        verdict = self.style.ERROR(f"{len(found)} differences.") if found else self.style.SUCCESS("All agree.")
        self.stdout.write(f"Compared {counts}{f', since {since:%Y-%m-%d}' if since else ''}. {verdict}")
        return found

    def _mend(self, found: list[Difference]) -> None:
        mendable = [difference for difference in found if difference.kind in MENDED]
        reconciliation.mend_totals(mendable)
        copies.mend(mendable)
        self.stdout.write(f"Made {len(mendable)} anew from what is recorded. Looking again.")
        if len(mendable) < len(found):
            self.stdout.write("What differs in the ledger itself needs a person: mend it with an adjustment.")


def _begin_of_last_month() -> datetime:
    month = periods.month_before(periods.month_of(periods.now_ms()))
    start, _ = periods.bounds(month)
    return start


def _read_day(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
