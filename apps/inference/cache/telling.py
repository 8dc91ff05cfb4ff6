"""Admit a request whose answer is known: it passes the gate like any other, costs the plan's part of the price, and is settled at once."""

import time
from typing import Literal

import msgspec

from aiscale.wire.codec import encode_event
from aiscale.wire.events import Finished
from aiscale.wire.jobs import LOCAL_PROVIDER, BillingTag
from apps.accounts.callers import Caller, PlanLimits
from apps.inference import replies
from apps.inference.cache.entries import Level
from apps.inference.cache.store import count_lookup
from apps.inference.catalog import CatalogModel
from apps.inference.completions import make_tag
from apps.spend import admission

HEADER = "x-aiscale-cache"
TOLD_WITHIN_MS = 30_000
"""A known answer is settled in moments; its hold lives so long and the gate's grace."""


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """Say what is known: how much it is, and where it was."""

    kind: Literal["generate", "encode"]
    level: Level
    prompt_tokens: int
    completion_tokens: int = 0
    finish_reason: Literal["stop", "length"] = "stop"
    stop_sequence: str | None = None
    pieces: int = 0


async def admit_known(
    known: Known,
    caller: Caller,
    model: CatalogModel,
    plan: PlanLimits,
    *,
    job_id: str,
    request_id: str,
    source: Literal["api", "chat"],
    generation: str = "",
) -> tuple[Finished, dict[str, str]]:
    """Return the request's end, and the answer's headers. ``model`` and ``plan`` as they hold for the caller's lane.

    The end is in the stream of settlement when this returns, and only then: nobody reads an answer that is not charged, and a process that
    dies on the way has either charged it or not asked for it. ``generation``: what `generations.recall` gave, if the answer was found by
    that. I/O: one Redis trip. Raises: AiscaleError; admission.Purged when that is outdated.
    """
    tokens = known.prompt_tokens + known.completion_tokens
    priced = price(model, plan)
    hold_nanousd = priced.terms.cost_nanousd(known.prompt_tokens, known.completion_tokens)
    provider = LOCAL_PROVIDER if model.upstream is None else model.upstream.name
    ends: list[tuple[Finished, bytes]] = []

    def make_end(plan_slug: str, now_ms: int) -> bytes:
        admitted = admission.Admitted(
            job_id=job_id, plan=plan_slug, worst_tokens=tokens, admitted_at_ms=now_ms, headers={}
        )
        tag = make_tag(caller, priced, request_id, source, hold_nanousd, admitted)
        tag = msgspec.structs.replace(tag, price_percent=plan.cached_price_percent, provider=provider)
        end = _make_end(known, model, job_id, tag)
        ends.append((end, encode_event(end)))
        return ends[-1][1]

    admitted = await admission.admit(
        admission.Ask(
            caller=caller,
            model=model.slug,
            job_id=job_id,
            worst_nanousd=hold_nanousd,
            worst_tokens=tokens,
            deadline_at_ms=time.time_ns() // 1_000_000 + TOLD_WITHIN_MS,
            priority=plan.priority,
            weight=plan.weight,
            provider=provider,
            make_end=make_end,
            cache_generation=generation,
        )
    )
    count_lookup(model.slug, known.level)
    end, data = ends[-1]
    replies.get_reader().remember(data)
    return end, {**admitted.headers, HEADER: known.level}


def price(model: CatalogModel, plan: PlanLimits) -> CatalogModel:
    """Return the model at the plan's price for what is known; its prompt has one price then."""
    terms = model.terms.at_percent(plan.cached_price_percent)
    terms = msgspec.structs.replace(terms, cached_prompt_nanousd_per_token=terms.prompt_nanousd_per_token)
    return msgspec.structs.replace(model, terms=terms)


def _make_end(known: Known, model: CatalogModel, job_id: str, tag: BillingTag) -> Finished:
    counts = (known.prompt_tokens, known.completion_tokens)
    return Finished(
        job_id=job_id,
        seq=known.pieces + 1,
        kind=known.kind,
        model=model.slug,
        model_version=model.version,
        finish_reason=known.finish_reason,
        prompt_tokens=known.prompt_tokens,
        completion_tokens=known.completion_tokens,
        cached_tokens=known.prompt_tokens,
        cache=known.level,
        saved_nanousd=model.terms.cost_nanousd(*counts) - tag.hold_nanousd,
        stop_sequence=known.stop_sequence,
        billing=tag,
        finished_at_ms=tag.admitted_at_ms,
    )
