"""Look for the vectors of texts that were embedded before, and keep new ones: each text for itself, whatever request it came with."""

import asyncio
from collections.abc import Mapping
from typing import Literal

import msgspec

from aiscale.wire.jobs import BillingTag
from apps.accounts.callers import Caller, PlanLimits
from apps.inference import lanes
from apps.inference.cache import generations, policy, telling
from apps.inference.cache.entries import Level, derive_key
from apps.inference.cache.flights import get_flights
from apps.inference.cache.policy import Policy, Wish
from apps.inference.cache.store import Found, count_lookup, get_store
from apps.inference.catalog import CatalogModel

FLIGHT_PATIENCE_S = 10.0
_FARTHEST: tuple[Level, ...] = ("miss", "l3", "l2", "l1")


async def find(
    wish: Wish, model: CatalogModel, plan: PlanLimits, caller: Caller, inputs: list[list[int]], *, recalls: bool = False
) -> "Known":
    """Look for each text's vector; a text that others compute right now is waited for, if there is nothing else to do.

    I/O: none when this process knows all; else a Redis trip or two and one SQL statement at the most, and Redis while waiting. ``recalls``:
    go by what this process remembers of purges; the gate must then compare `Known.generation`.
    """
    chosen = policy.choose(wish, deterministic=True, plan_scope=plan.cache_scope, caller=caller)
    recalled = None if chosen.is_off or not recalls else generations.recall(model.slug, caller.organization_id)
    generation = recalled
    if generation is None and not chosen.is_off:
        generation = await generations.find(model.slug, caller.organization_id)
    if generation is None:
        chosen, generation = policy.OFF, ""
    known = Known(chosen, model, plan, caller, inputs, generation)
    known.generation = recalled or ""
    if chosen.read:
        await known.look()
    return known


class Known:
    """Hold the texts of one request, with the vectors that are known."""

    def __init__(
        self,
        chosen: Policy,
        model: CatalogModel,
        plan: PlanLimits,
        caller: Caller,
        inputs: list[list[int]],
        generation: str,
    ) -> None:
        self._policy = chosen
        self._model, self._plan, self._caller = model, plan, caller
        self._inputs = inputs
        self._keys = [
            derive_key(chosen.scope, generation, model.slug, model.version, None, token_ids) for token_ids in inputs
        ]
        self._found: dict[bytes, Found] = {}
        self._mine: set[bytes] = set()
        self.generation = ""
        """What this process remembered of purges and the gate is to compare (`admission.Ask`); '' when it was asked for just now."""

    @property
    def count(self) -> int:
        return len(self._inputs)

    @property
    def missing(self) -> list[list[int]]:
        """The texts to compute, each once."""
        return list(self._list_missing().values())

    @property
    def cached_tokens(self) -> int:
        """How many of the request's tokens are not computed for it."""
        return sum(map(len, self._inputs)) - sum(map(len, self.missing))

    @property
    def headers(self) -> dict[str, str]:
        """Say where the vectors were: the farthest level, or that some had to be computed. Nothing when the cache was not asked."""
        return {} if self._policy.is_off else {telling.HEADER: self._level}

    async def look(self) -> None:
        """Find what is known, claim what is not, and wait for what others compute if that is all. I/O: see `find`."""
        store = get_store()
        self._found = store.find_here(self._keys)
        missing = list(self._list_missing())
        if not missing:
            return
        flights = get_flights()
        self._mine, values = await flights.claim_and_look(missing)
        self._take(values, "l2")
        if self._mine:
            lasting = await store.find_lasting(list(self._mine))
            self._take({key: found.value for key, found in lasting.items()}, "l3")
        if not self._mine:
            others = list(self._list_missing())
            waited = await asyncio.gather(*(flights.wait(key, FLIGHT_PATIENCE_S) for key in others))
            pairs = zip(others, waited, strict=True)
            self._found |= {key: Found(value, "l1") for key, value in pairs if value is not None}

    def _take(self, values: Mapping[bytes, bytes], level: Level) -> None:
        """Take what a lower level knew, and let go of those texts. I/O: one Redis trip, for which nobody waits."""
        store, mine = get_store(), self._mine & values.keys()
        self._mine -= mine
        for key, value in values.items():
            self._found[key] = Found(value, level)
            store.local.keep(key, value)
        if mine:
            store.keep_soon(
                {}, model=self._model.slug, scope=self._policy.scope, then=get_flights().release(mine, values)
            )

    def fill(self, data: bytes, dimensions: int) -> None:
        """Take the vectors of what was missing, and keep them. I/O: one Redis trip, for which nobody waits."""
        size = dimensions * 4
        computed = {
            key: data[index * size : (index + 1) * size] for index, key in enumerate(list(self._list_missing()))
        }
        count_lookup(self._model.slug, "miss", len(computed))
        for key in self._found:
            count_lookup(self._model.slug, self._found[key].level)
        level = self._level
        self._found |= {key: Found(value, level) for key, value in computed.items()}
        mine, self._mine = self._mine, set()
        told = get_flights().release(mine, computed)
        if self._policy.write or told:
            kept = computed if self._policy.write else {}
            get_store().keep_soon(kept, model=self._model.slug, scope=self._policy.scope, then=told)

    def join(self) -> bytes:
        """Return all vectors, in the order of the texts."""
        return b"".join(self._found[key].value for key in self._keys)

    async def close(self) -> None:
        """Let those who wait for what did not come compute it themselves. I/O: one Redis trip then."""
        mine, self._mine = self._mine, set()
        for key in mine:
            await get_flights().land(key, None)

    def price(self, model: CatalogModel, plan: PlanLimits) -> CatalogModel:
        """Return the model with the plan's price for what is known."""
        cached = model.terms.at_percent(plan.cached_price_percent).prompt_nanousd_per_token
        return msgspec.structs.replace(
            model, terms=msgspec.structs.replace(model.terms, cached_prompt_nanousd_per_token=cached)
        )

    def mark(self, tag: BillingTag) -> BillingTag:
        return msgspec.structs.replace(tag, price_percent=self._plan.cached_price_percent)

    async def tell(self, request_id: str, source: Literal["api", "chat"]) -> dict[str, str]:
        """Admit the request: everything is known. Returns the answer's headers. I/O: one Redis trip. Raises: AiscaleError; admission.Purged
        when what it found is from before a purge."""
        known = telling.Known(kind="encode", level=self._level, prompt_tokens=sum(map(len, self._inputs)))
        _, headers = await telling.admit_known(
            known,
            self._caller,
            self._model,
            self._plan,
            job_id=lanes.name_job(request_id),
            request_id=request_id,
            source=source,
            generation=self.generation,
        )
        return headers

    @property
    def _level(self) -> Level:
        levels = {found.level for found in self._found.values()}
        if self._list_missing() or not levels:
            return "miss"
        return next(level for level in _FARTHEST if level in levels)

    def _list_missing(self) -> dict[bytes, list[int]]:
        return {
            key: token_ids for key, token_ids in zip(self._keys, self._inputs, strict=True) if key not in self._found
        }
