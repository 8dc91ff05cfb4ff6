"""Answer ``POST /v1/responses``."""

from typing import Any

from aiscale.errors import AiscaleError
from aiscale.wire.events import Delta, Finished
from apps.accounts.callers import Caller, on_thread
from apps.gateway import parameters
from apps.gateway.exchange import Exchange
from apps.gateway.formats import read_format
from apps.gateway.responses import objects, storage
from apps.gateway.responses.schema import ResponseBody, read_response
from apps.gateway.streaming import COMMENT, check_end, read_whole, with_silences
from apps.inference import completions
from apps.inference.completions import CompletionRequest, Run
from apps.inference.prompts import ChatMessage

NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}


async def answer_creation(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Make a response: whole, streamed, or in the background. Raises: AiscaleError before the first byte."""
    wanted, said = read_response(body)
    with parameters.renamed(NAMES):
        grammar = read_format(wanted.text.format, described_in=None)
    before = await _read_before(wanted, caller)
    system = [ChatMessage(role="system", content=wanted.instructions)] if wanted.instructions else []
    request = CompletionRequest(
        request_id=exchange.request_id,
        source="api",
        model=wanted.model,
        messages=[*system, *before, *said],
        max_tokens=wanted.max_output_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        grammar=grammar,
        # the log outlives this process: what becomes of a stored response can always be found out
        keep_log=wanted.store,
    )
    with parameters.renamed(NAMES):
        run = await completions.start(request, caller)
    async with run:
        head = objects.make_head(wanted, run, objects.make_response_id())
        if wanted.store:
            previous_id = wanted.previous_response_id or ""
            await on_thread(lambda: storage.create(caller.organization_id, head, run.job_id, said, previous_id))
        if wanted.background:
            run.detach()
            await exchange.send_json(200, head, run.headers)
        elif wanted.stream:
            await Stream(exchange, head, run).send()
        else:
            await exchange.send_json(200, await _wait(head, run), run.headers)


async def _read_before(wanted: ResponseBody, caller: Caller) -> list[ChatMessage]:
    if not wanted.previous_response_id:
        return []
    previous_id = wanted.previous_response_id
    return await on_thread(lambda: storage.read_conversation(caller.organization_id, previous_id))


async def _wait(head: dict[str, Any], run: Run) -> dict[str, Any]:
    try:
        response = objects.end(head, *await read_whole(run))
    except AiscaleError as error:
        failed = objects.fail(head, error)
        await _keep(failed)
        raise
    await _keep(response)
    return response


async def _keep(response: dict[str, Any]) -> None:
    if response["store"]:
        await on_thread(lambda: storage.finish(response))


class Stream:
    """Send one response as its events."""

    def __init__(self, exchange: Exchange, head: dict[str, Any], run: Run) -> None:
        self._exchange = exchange
        self._head = head
        self._run = run
        self._item_id = objects.make_item_id(head["id"])
        self._sequence_number = 0
        self._text: list[str] = []
        self._has_item = False

    async def send(self) -> None:
        """Send all events. Raises: AiscaleError, before anything was sent."""
        try:
            async for event in with_silences(self._run.events()):
                if isinstance(event, Finished):
                    check_end(self._run, event)
                    await self._end(event)
                elif isinstance(event, Delta):
                    await self._begin()
                    self._text.append(event.text)
                    await self._say("response.output_text.delta", **self._place(), delta=event.text, logprobs=[])
                elif event is None:
                    await self._begin()
                    await self._exchange.send_part(COMMENT)
        except AiscaleError as error:
            failed = objects.fail(self._head, error)
            await _keep(failed)
            if not self._exchange.started:
                raise
            self._exchange.failed = True
            await self._say("response.failed", response=failed)
        await self._exchange.end_stream()

    async def _begin(self) -> None:
        """Open the stream with its first event: whatever could go wrong until here had its own status."""
        if self._has_item:
            return
        self._has_item = True
        await self._exchange.start_stream(self._run.headers)
        await self._say("response.created", response=self._head)
        await self._say("response.in_progress", response=self._head)
        item = objects.make_message(self._item_id, None, "in_progress")
        await self._say("response.output_item.added", output_index=0, item=item)
        await self._say("response.content_part.added", **self._place(), part=objects.make_part(""))

    async def _end(self, event: Finished) -> None:
        await self._begin()
        text = "".join(self._text)
        response = objects.end(self._head, text, event)
        # written before it is told: who reads the last event can go on from this response
        await _keep(response)
        await self._say("response.output_text.done", **self._place(), text=text, logprobs=[])
        await self._say("response.content_part.done", **self._place(), part=objects.make_part(text))
        await self._say("response.output_item.done", output_index=0, item=response["output"][0])
        await self._say(f"response.{response['status']}", response=response)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    async def _say(self, kind: str, **fields: Any) -> None:
        await self._exchange.send_event({"type": kind, "sequence_number": self._sequence_number, **fields}, kind)
        self._sequence_number += 1
