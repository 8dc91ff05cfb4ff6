"""Answer ``POST /v1/responses`` and ``/v1/responses/input_tokens``."""

from typing import Any

from aiscale.errors import AiscaleError, Code
from aiscale.wire.events import Delta, Finished, ToolCallPart
from aiscale.wire.jobs import Grammar
from apps.accounts.callers import Caller, on_thread
from apps.gateway import obfuscation, parameters
from apps.gateway.cache_wishes import read_wish
from apps.gateway.chat_choices import Calls
from apps.gateway.exchange import Exchange
from apps.gateway.formats import read_format
from apps.gateway.responses import objects, storage
from apps.gateway.responses.items import join_calls, read_tools
from apps.gateway.responses.schema import InputBody, read_input, read_response
from apps.gateway.streaming import COMMENT, check_end, read_whole, with_silences
from apps.gateway.tool_schema import check_results
from apps.inference import catalog, completions, prompts
from apps.inference.completions import CompletionRequest, Run
from apps.inference.prompts import ChatMessage
from apps.inference.tools import Tools

NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}


async def answer_creation(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Make a response: whole, streamed, or in the background. Raises: AiscaleError before the first byte."""
    wanted, said = read_response(body)
    messages, tools, grammar = await _read_prompt(wanted, said, caller)
    request = CompletionRequest(
        request_id=exchange.request_id,
        source="api",
        model=wanted.model,
        messages=messages,
        max_tokens=wanted.max_output_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        grammar=grammar,
        tools=tools,
        cache=read_wish(exchange, wanted.cache),
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
            exchange.obfuscates = obfuscation.is_wished(wanted.stream_options)
            await Stream(exchange, head, run).send()
        else:
            await exchange.send_json(200, await _wait(head, run), run.headers)


async def answer_count(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Count the tokens of an input, as they would be charged. Costs nothing. Raises: AiscaleError."""
    wanted, said = read_input(body)
    messages, tools, _ = await _read_prompt(wanted, said, caller)
    with parameters.renamed(NAMES):
        model = await catalog.get_model(wanted.model, "generate")
        tokens = await prompts.build_prompt(model, messages, tools)
    await exchange.send_json(200, {"object": "response.input_tokens", "input_tokens": len(tokens)})


async def _read_prompt(
    wanted: InputBody, said: list[ChatMessage], caller: Caller
) -> tuple[list[ChatMessage], Tools | None, Grammar | None]:
    """Return all turns, what was said before among them, the tools and what the text is held to. Raises: AiscaleError."""
    with parameters.renamed(NAMES):
        grammar = read_format(wanted.text.format, described_in=None)
    before = await _read_before(wanted, caller)
    tools = read_tools(wanted.tools, wanted.tool_choice, wanted.parallel_tool_calls)
    if tools is not None and grammar is not None:
        message = "An answer of a text.format cannot call tools. Leave out text.format, or tools."
        raise AiscaleError(Code.UNSUPPORTED_PARAMETER, message, param="text.format")
    check_results([*before, *said], "input")
    system = [ChatMessage(role="system", content=wanted.instructions)] if wanted.instructions else []
    return join_calls([*system, *before, *said]), tools, grammar


async def _read_before(wanted: InputBody, caller: Caller) -> list[ChatMessage]:
    if not wanted.previous_response_id:
        return []
    previous_id = wanted.previous_response_id
    return await on_thread(lambda: storage.read_conversation(caller.organization_id, previous_id))


async def _wait(head: dict[str, Any], run: Run) -> dict[str, Any]:
    try:
        text, calls, event = await read_whole(run)
        response = objects.end(head, text, event, calls.list_all())
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
    """Send one response as its events. Its message has an item once there is text, and each call has one."""

    def __init__(self, exchange: Exchange, head: dict[str, Any], run: Run) -> None:
        self._exchange = exchange
        self._head = head
        self._run = run
        self._item_id = objects.make_item_id(head["id"])
        self._sequence_number = 0
        self._text: list[str] = []
        self._text_at: int | None = None
        """The place of the message among the items."""
        self._calls = Calls()
        self._places: dict[int, int] = {}
        """The place of each call among the items."""

    async def send(self) -> None:
        """Send all events. Raises: AiscaleError, before anything was sent."""
        try:
            async for event in with_silences(self._run.events()):
                if isinstance(event, Finished):
                    check_end(self._run, event)
                    await self._end(event)
                elif isinstance(event, Delta):
                    await self._begin()
                    await self._tell(event)
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
        if self._exchange.started:
            return
        await self._exchange.start_stream(self._run.headers)
        await self._say("response.created", response=self._head)
        await self._say("response.in_progress", response=self._head)
        if not self._head["tools"]:
            await self._begin_message()

    async def _begin_message(self) -> None:
        if self._text_at is not None:
            return
        self._text_at = len(self._places)
        item = objects.make_message(self._item_id, None, "in_progress")
        await self._say("response.output_item.added", output_index=self._text_at, item=item)
        await self._say("response.content_part.added", **self._place(), part=objects.make_part(""))

    async def _tell(self, delta: Delta) -> None:
        if delta.text:
            await self._begin_message()
            self._text.append(delta.text)
            await self._say("response.output_text.delta", **self._place(), delta=delta.text, logprobs=[])
        self._calls.take(delta.tool_calls)
        for part in delta.tool_calls:
            await self._tell_call(part)

    async def _tell_call(self, part: ToolCallPart) -> None:
        if part.index not in self._places:
            self._places[part.index] = len(self._places) + (self._text_at is not None)
            item = objects.make_call(part, self._head["id"], "in_progress") | {"arguments": ""}
            await self._say("response.output_item.added", output_index=self._places[part.index], item=item)
        if part.arguments:
            place = {"item_id": self._name(part), "output_index": self._places[part.index]}
            await self._say("response.function_call_arguments.delta", **place, delta=part.arguments)

    async def _end(self, event: Finished) -> None:
        await self._begin()
        if not self._calls:
            await self._begin_message()
        text, calls = "".join(self._text), self._calls.list_all()
        text_at = self._text_at or 0
        calls.sort(key=lambda call: self._places[call.index])
        response = objects.end(self._head, text, event, calls, text_at=text_at)
        # written before it is told: who reads the last event can go on from this response
        await _keep(response)
        if self._text_at is not None:
            await self._say("response.output_text.done", **self._place(), text=text, logprobs=[])
            await self._say("response.content_part.done", **self._place(), part=objects.make_part(text))
        for call in calls:
            place = {"item_id": self._name(call), "output_index": self._places[call.index]}
            said = {"name": call.name, "arguments": call.arguments}
            await self._say("response.function_call_arguments.done", **place, **said)
        for index, item in enumerate(response["output"]):
            await self._say("response.output_item.done", output_index=index, item=item)
        await self._say(f"response.{response['status']}", response=response)

    def _name(self, call: ToolCallPart) -> str:
        return str(objects.make_call(call, self._head["id"], "")["id"])

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": self._text_at, "content_index": 0}

    async def _say(self, kind: str, **fields: Any) -> None:
        await self._exchange.send_event({"type": kind, "sequence_number": self._sequence_number, **fields}, kind)
        self._sequence_number += 1
