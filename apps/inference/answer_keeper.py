"""Look on while an answer is made: tell it to those who follow, and put it into the cache when it ends well."""

from typing import Any, Literal

from aiscale.wire.events import Delta, Event, Finished, Started
from apps.inference.cache import semantic
from apps.inference.cache.entries import Answer, Piece, encode_answer
from apps.inference.cache.flights import get_flights
from apps.inference.cache.store import get_store
from apps.inference.completions import Run


class AnswerKeeper:
    """Gather the answer that passes, and let go of its flight (which it ``owns`` or not) however it ends.

    ``asked`` is what its question was looked for with among alike ones: the answer teaches it.
    """

    def __init__(
        self,
        key: bytes,
        *,
        model: str,
        version: str,
        scope: str,
        keeps: bool,
        owns: bool,
        asked: semantic.Asked | None = None,
    ) -> None:
        self.keeps = keeps
        self.run: Run | None = None
        """Whose answer it is. Should a fallback have taken the model's place, nobody may follow it."""
        self._key = key
        self._model, self._version = model, version
        self._scope = scope
        self._asked = asked
        self._texts: dict[int, list[str]] = {}
        self._logprobs: dict[int, list[Any]] = {}
        self._ends: dict[int, Literal["stop", "length"]] = {}
        self._flies = owns

    async def take(self, event: Event) -> None:
        if isinstance(event, Started):
            self._texts, self._logprobs, self._ends = {}, {}, {}
        elif isinstance(event, Delta):
            self._texts.setdefault(event.index, []).append(event.text)
            self._logprobs.setdefault(event.index, []).extend(event.logprobs)
            if event.end is not None:
                self._ends[event.index] = event.end
            if self._flies and self.run is not None and self.run.model != self._model:
                await self.close()
            elif self._flies:
                get_flights().tell(self._key, event)
        elif isinstance(event, Finished):
            await self._end(event)

    async def close(self, value: bytes | None = None) -> None:
        """End the flight, with an answer or none. I/O: one Redis trip, the first time. Idempotent."""
        if self._flies:
            self._flies = False
            await get_flights().land(self._key, value)

    async def _end(self, event: Finished) -> None:
        is_good = event.finish_reason in ("stop", "length")
        is_ours = (event.model, event.model_version) == (self._model, self._version)
        answer = self._make_answer(event) if is_good and is_ours else None
        if answer is not None and self._asked is not None:
            semantic.learn(self._asked, answer)
        if answer is None or not self.keeps:
            await self.close()
            return
        value = encode_answer(answer)
        await get_store().keep_many({self._key: value}, model=self._model, scope=self._scope)
        await self.close(value)

    def _make_answer(self, event: Finished) -> Answer:
        reason: Any = event.finish_reason
        pieces = tuple(
            Piece(
                index=index,
                text="".join(self._texts[index]),
                end=self._ends.get(index, reason),
                logprobs=tuple(self._logprobs[index]),
            )
            for index in sorted(self._texts)
        )
        return Answer(
            pieces=pieces,
            finish_reason=reason,
            prompt_tokens=event.prompt_tokens,
            completion_tokens=event.completion_tokens,
            stop_sequence=event.stop_sequence,
        )
