"""Show every check of the gate for a request that is not sent."""

import asyncio
import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from aiscale.db import format_usd
from aiscale.errors import AiscaleError
from apps.accounts import callers
from apps.accounts.callers import Caller
from apps.accounts.keys import PREFIX
from apps.accounts.models import ApiKey
from apps.inference import catalog, completions, lanes
from apps.spend import admission, periods
from apps.spend.refusals import Check, say_moment

DRY_JOB = "job_dry_run"
NAMES = {
    "invalid_api_key": "key belongs to its organization",
    "key_revoked": "key is not revoked",
    "key_expired": "key has not expired",
    "account_inactive": "organization is active",
    "killed": "kill switches",
    "model_not_allowed": "model is allowed",
    "rate_limit_exceeded": "rate",
    "too_many_in_flight": "requests in flight",
    "backend_unavailable": "workers of the model",
    "queue_full": "queue of the model",
    "insufficient_quota": "budget",
}


class Command(BaseCommand):
    help = "Show each check that the gate makes for a request with a key and a model, with its numbers. Nothing is counted or held."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--key", required=True, help="the key's id (key_...), or the key itself")
        parser.add_argument("--model", required=True)
        parser.add_argument(
            "--max-tokens", type=int, metavar="N", help="of the answer; as many as plan and model allow when left out"
        )
        parser.add_argument(
            "--prompt-tokens", type=int, default=100, metavar="N", help="of the prompt; 100 when left out"
        )
        parser.add_argument("--json", action="store_true", help="write JSON")

    def handle(self, *args: Any, key: str, model: str, **options: Any) -> None:
        if options["prompt_tokens"] < 1:
            raise CommandError("--prompt-tokens must be at least 1.")
        caller = _find_caller(key)
        try:
            ask, checks = asyncio.run(_explain(caller, model, options["prompt_tokens"], options["max_tokens"]))
        except AiscaleError as error:
            raise CommandError(error.message) from error
        refusing = next((check for check in checks if not check.passes), None)
        if options["json"]:
            self.stdout.write(json.dumps(_describe(ask, checks, refusing), indent=2))
            return
        self.stdout.write(
            f"{caller.key_id} of {caller.organization_id} on the plan {caller.plan} asks {model} for at most {ask.worst_tokens} tokens, "
            f"{format_usd(ask.worst_nanousd)}.\n"
        )
        width = max(len(NAMES[check.code]) for check in checks)
        for check in checks:
            verdict = self.style.SUCCESS("pass  ") if check.passes else self.style.ERROR("REFUSE")
            self.stdout.write(f"{verdict}  {NAMES[check.code]:<{width}}  {_list_facts(check)}")
        self.stdout.write(
            "\nIt would be admitted." if refusing is None else f"\nIt would be refused: {refusing.message}"
        )


def _find_caller(key: str) -> Caller:
    """Return the caller of a key in any state. I/O: one SQL statement. Raises: CommandError."""
    fields = {"digest": callers.hash_key(key)} if key.startswith(PREFIX) else {"public_id": key}
    found = ApiKey.objects.select_related("organization__plan", "created_by").filter(**fields).first()
    if found is None:
        raise CommandError(
            "There is no such key. Give its id (key_...) as the list of keys shows it, or the key itself."
        )
    return Caller(
        organization_id=found.organization.public_id,
        user_id=found.created_by.public_id,
        key_id=found.public_id,
        key_digest=found.digest,
        plan=found.organization.plan.slug,
    )


async def _explain(
    caller: Caller, slug: str, prompt_tokens: int, max_tokens: int | None
) -> tuple[admission.Ask, list[Check]]:
    """Do what a request would do up to the gate, which only explains. Raises: AiscaleError."""
    model, plan = lanes.apply(caller, await catalog.get_model(slug), await callers.get_plan(caller.plan))
    if model.kind == "generate":
        max_tokens = completions.choose_max_tokens(max_tokens, prompt_tokens, model, plan, param="prompt")
    elif max_tokens:
        raise CommandError(f"{slug} makes embeddings, which have no answer: leave --max-tokens out.")
    ask = admission.Ask(
        caller=caller,
        model=model.slug,
        job_id=DRY_JOB,
        worst_nanousd=model.terms.cost_nanousd(prompt_tokens, max_tokens or 0),
        worst_tokens=prompt_tokens + (max_tokens or 0),
        deadline_at_ms=periods.now_ms(),
        priority=plan.priority,
        makes_text=model.kind == "generate",
    )
    return ask, await admission.explain(ask)


def _describe(ask: admission.Ask, checks: list[Check], refusing: Check | None) -> dict[str, Any]:
    return {
        "key": ask.caller.key_id,
        "organization": ask.caller.organization_id,
        "plan": ask.caller.plan,
        "model": ask.model,
        "worst_tokens": ask.worst_tokens,
        "worst_nanousd": ask.worst_nanousd,
        "would_pass": refusing is None,
        "message": refusing.message if refusing else None,
        "checks": [
            {
                "check": check.code.value,
                "passes": check.passes,
                **{name: _type(value) for name, value in check.facts.items()},
            }
            for check in checks
        ],
    }


def _type(value: str) -> int | str | None:
    return int(value) if value.lstrip("-").isdecimal() else value or None


def _list_facts(check: Check) -> str:
    return ", ".join(f"{_name(name)} {_say(name, value)}" for name, value in check.facts.items())


def _name(name: str) -> str:
    for suffix in ("_nanousd", "_at_ms", "_ms", "_s"):
        name = name.removesuffix(suffix)
    return name.replace("_", " ")


def _say(name: str, value: str) -> str:
    if value == "":
        return "none"
    if name.endswith("_nanousd"):
        return format_usd(int(value))
    if name.endswith("_at_ms"):
        return say_moment(periods.to_datetime(int(value)))
    if name.endswith("_ms"):
        return periods.format_duration(int(value))
    return f"{value} s" if name.endswith("_s") else value
