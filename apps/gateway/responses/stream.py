"""Tell a response as its events."""

from collections.abc import AsyncIterator
from typing import Any, Protocol

from aiscale.errors import AiscaleError
from aiscale.wire.events import Delta, Event, Finished
from apps.gateway.exchange import Exchange
from apps.gateway.responses import objects, storage
from apps.gateway.responses.output import Item, Output
from apps.gateway.streaming import COMMENT, with_silences
from apps.inference.endings import make_failure


class Source(Protocol):
    """Tell what becomes of a job: a `Run`, or who follows one."""

    headers: dict[str, str]

    def events(self) -> AsyncIterator[Event]: ...


class Stream:
    """Send one response as its events. Each item is opened once, when something of it comes, and closed once: when another one begins,
    or at the end, if it is a call whose arguments are not whole by then.

    The events of the same job are always numbered alike: who comes back names the last one that came (``starting_after``).
    """

    def __init__(
        self,
        exchange: Exchange,
        head: dict[str, Any],
        run: Source,
        starting_after: int = -1,
        is_own: bool = True,
    ) -> None:
        """``is_own``: the run is this request's alone, so that its failure is the response's end; else others find out how it ended."""
        self._exchange = exchange
        self._head = head
        self._run = run
        self._starting_after = starting_after
        self._is_own = is_own
        self._sequence_number = 0
        self._output = Output(head["id"])
        self._open: list[Item] = []
        self._made: dict[str, Any] = {}
        """What there is of an answer that failed."""

    async def send(self) -> None:
        """Send all events. Raises: AiscaleError, before anything was sent."""
        try:
            async for event in with_silences(self._run.events()):
                if isinstance(event, Finished):
                    await self._end(event)
                elif isinstance(event, Delta):
                    await self._begin()
                    for item, piece in self._output.take(event):
                        await self._tell(item, piece)
                elif event is None:
                    await self._begin()
                    await self._exchange.send_part(COMMENT)
        except AiscaleError as error:
            await self._fail(error)
        await self._exchange.end_stream()

    async def _begin(self) -> None:
        """Open the stream with its first event: whatever could go wrong until here had its own status."""
        if self._exchange.started:
            return
        await self._exchange.start_stream(self._run.headers)
        await self._say("response.created", response=self._head)
        await self._say("response.in_progress", response=self._head)
        if not self._head["tools"]:
            await self._change(self._output.begin_message())

    async def _tell(self, item: Item, piece: str) -> None:
        await self._change(item)
        if item.call is None:
            await self._say("response.output_text.delta", **_place(item), delta=piece, logprobs=[])
        elif piece:
            await self._say("response.function_call_arguments.delta", **_place(item), delta=piece)

    async def _change(self, item: Item) -> None:
        """Open this item, unless it is open, and close those to which nothing more can come."""
        if item in self._open:
            return
        for other in [other for other in self._open if other.call is None or other.is_whole]:
            await self._close(other, "completed")
        self._open.append(item)
        empty: dict[str, Any] = {"content": []} if item.call is None else {"arguments": ""}
        begun = item.describe("in_progress") | empty
        await self._say("response.output_item.added", output_index=item.place, item=begun)
        if item.call is None:
            await self._say("response.content_part.added", **_place(item), part=objects.make_part(""))

    async def _close(self, item: Item, status: str) -> None:
        self._open.remove(item)
        if item.call is None:
            await self._say("response.output_text.done", **_place(item), text=item.text, logprobs=[])
            await self._say("response.content_part.done", **_place(item), part=objects.make_part(item.text))
        else:
            said = {"name": item.call.name, "arguments": item.text}
            await self._say("response.function_call_arguments.done", **_place(item), **said)
        await self._say("response.output_item.done", output_index=item.place, item=item.describe(status))

    async def _end(self, event: Finished) -> None:
        """Tell how it ended. There is no event of a response that was cancelled: clients know it by its status.

        Raises: AiscaleError for an end that leaves no answer.
        """
        if not objects.has_answer(event):
            self._made = objects.make_rest(self._output.describe(is_whole=False), event)
            raise make_failure(event, self._run.headers)
        await self._begin()
        if not self._output.items:
            await self._change(self._output.begin_message())
        is_whole = event.finish_reason == "stop"
        response = objects.end(self._head, self._output.describe(is_whole=is_whole), event)
        # written before its last item is told: who reads that can go on from this response
        await storage.keep(response)
        for item in list(self._open):
            await self._close(item, self._output.tell_status(item, is_whole=is_whole))
        await self._say("response.completed" if is_whole else "response.incomplete", response=response)

    async def _fail(self, error: AiscaleError) -> None:
        """Raise: AiscaleError, when nothing was sent yet."""
        failed = objects.fail(self._head, error, self._made)
        if self._is_own:
            await storage.keep(failed)
        if not self._exchange.started:
            raise error
        self._exchange.failed = True
        await self._say("response.failed", response=failed)

    async def _say(self, kind: str, **fields: Any) -> None:
        number = self._sequence_number
        self._sequence_number += 1
        if number > self._starting_after:
            await self._exchange.send_event({"type": kind, "sequence_number": number, **fields}, kind)


def _place(item: Item) -> dict[str, Any]:
    place: dict[str, Any] = {"item_id": item.item_id, "output_index": item.place}
    return {**place, "content_index": 0} if item.call is None else place
