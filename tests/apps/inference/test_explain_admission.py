"""explain_admission shows what the gate would do, by the gate's own script, and changes nothing."""

import json
from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from redis import Redis

from apps.accounts.keys import revoke_key
from apps.spend import balance, budgets, killswitch
from apps.spend.models import Budget
from tests.apps.conftest import Cast
from tests.apps.spend.cast import ADA, dump

CHAT, EMBED = "smollm2-135m-instruct", "all-minilm-l6-v2"


@pytest.fixture
def client(cast: Cast, redis_url: str) -> Iterator[Redis]:
    client = Redis.from_url(redis_url)
    killswitch.restore()
    balance.restore()
    balance.publish(budgets.organization_scope(cast.organization.public_id))
    yield client
    client.close()


def explain(cast: Cast, **options: Any) -> dict[str, Any]:
    out = StringIO()
    values = {"key": cast.key.public_id, "model": CHAT, "json": True} | options
    call_command("explain_admission", stdout=out, **values)
    answer: dict[str, Any] = json.loads(out.getvalue())
    return answer


def test_every_check_is_there_with_its_numbers_and_nothing_is_counted(cast: Cast, client: Redis) -> None:
    before = dump(client)
    for _ in range(2):
        answer = explain(cast, prompt_tokens=10, max_tokens=20)
    assert dump(client) == before
    assert answer["would_pass"] and answer["message"] is None and answer["worst_tokens"] == 30
    names = [check["check"] for check in answer["checks"]]
    assert names == [
        *("invalid_api_key", "key_expired", "key_revoked", "account_inactive", "killed"),
        *("model_not_allowed", "model_not_allowed", "rate_limit_exceeded", "rate_limit_exceeded"),
        *("too_many_in_flight", "backend_unavailable", "queue_full", "insufficient_quota"),
    ]
    tokens = answer["checks"][8]
    assert (tokens["what"], tokens["limit"], tokens["used"], tokens["asked"]) == ("tokens", 2_000_000, 0, 30)
    budget = answer["checks"][-1]
    assert (budget["scope"], budget["period"]) == (f"organization:{cast.organization.public_id}", "monthly")
    assert (budget["limit_nanousd"], budget["worst_nanousd"]) == (5000 * 10**9, answer["worst_nanousd"])


def test_all_that_refuses_is_shown_and_the_first_is_what_a_caller_reads(cast: Cast, client: Redis) -> None:
    Budget.objects.create(scope=f"key:{cast.key.public_id}", limit_nanousd=5, period="daily")
    cast.key.allowed_models = [EMBED]
    cast.key.save()
    answer = explain(cast)
    assert [check["check"] for check in answer["checks"] if not check["passes"]] == [
        "model_not_allowed",
        "insufficient_quota",
    ]
    assert not answer["would_pass"] and answer["message"].startswith("This API key is not allowed to use the model")
    killswitch.trip(f"model:{CHAT}", reason="An incident", by=ADA)
    assert "An incident" in explain(cast)["message"]
    revoke_key(cast.key)
    answer = explain(cast)
    assert "was revoked" in answer["message"] and len(answer["checks"]) > 10


def test_a_raw_key_works_too_and_the_table_reads_well(cast: Cast, client: Redis) -> None:
    out = StringIO()
    call_command("explain_admission", key=cast.raw, model=EMBED, stdout=out, no_color=True)
    printed = out.getvalue()
    assert "It would be admitted." in printed and cast.raw not in printed
    line = next(line for line in printed.splitlines() if "budget" in line)
    assert line.startswith("pass    budget") and "limit $5,000.00, ends 1 " in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key": "key_unknown"}, "There is no such key"),
        ({"model": "gpt-9"}, "does not exist"),
        ({"max_tokens": 10**6}, "allows at most"),
        ({"prompt_tokens": 0}, "at least 1"),
        ({"model": EMBED, "max_tokens": 3}, "leave --max-tokens out"),
    ],
)
def test_what_cannot_be_asked_is_said(cast: Cast, client: Redis, options: dict[str, Any], words: str) -> None:
    with pytest.raises(CommandError, match=words):
        explain(cast, **options)
