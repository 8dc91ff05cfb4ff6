"""Answer ``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from typing import Any

from aiscale.wire.events import Delta, Finished, ToolCallPart
from apps.accounts.callers import Caller
from apps.gateway import parameters
from apps.gateway.cache_wishes import read_wish
from apps.gateway.exchange import Exchange
from apps.gateway.messages.schema import NAMES, check_version, read_count, read_messages
from apps.gateway.streaming import check_end, read_whole, with_silences
from apps.inference import catalog, completions, prompts
from apps.inference.call_readers import ObjectEnd
from apps.inference.completions import CompletionRequest, Run
from apps.inference.tools import read_arguments

STANDARD = "standard"
"""The tier of what is no line of a batch."""
_TEXT = "text"


async def answer_messages(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Answer a conversation, streamed or whole. Raises: AiscaleError before the first byte."""
    check_version(exchange)
    wanted, conversation = read_messages(body)
    request = CompletionRequest(
        request_id=exchange.request_id,
        source="api",
        model=wanted.model,
        messages=conversation.messages,
        words=conversation.prefill or None,
        max_tokens=wanted.max_tokens,
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        top_p=wanted.top_p,
        stop=tuple(wanted.stop_sequences),
        grammar=conversation.grammar,
        tools=conversation.tools,
        cache=read_wish(exchange, wanted.cache),
    )
    with parameters.renamed(NAMES):
        run = await completions.start(request, caller)
    async with run:
        if wanted.stream:
            await Stream(exchange, run).send()
        else:
            text, calls, event = await read_whole(run)
            content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text or not calls else []
            content += [_describe_call(call, read_arguments(call.arguments) or {}) for call in calls.list_all()]
            ending = _ending(event, called=bool(calls))
            tier = "batch" if caller.lane == "batch" else STANDARD
            value = _make_message(run, tier) | {"content": content, **ending, "usage": _usage(event, tier)}
            await exchange.send_json(200, value, run.headers)


async def answer_count(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Count the tokens of a conversation, as they would be charged. Costs nothing. Raises: AiscaleError."""
    check_version(exchange)
    wanted, conversation = read_count(body)
    model = await catalog.get_model(wanted.model, "generate")
    tokens = await prompts.build_prompt(model, conversation.messages, conversation.tools)
    begun = await prompts.encode_prompt(model, conversation.prefill) if conversation.prefill else []
    await exchange.send_json(200, {"input_tokens": len(tokens) + len(begun)})


class Stream:
    """Send one message as its events. Each block is opened once, when something of it comes, and closed once: when another one begins, or
    at the end, if it is a call whose input is not whole by then. Upstreams may tell several calls by turns.
    """

    def __init__(self, exchange: Exchange, run: Run) -> None:
        self._exchange = exchange
        self._run = run
        self._blocks = 0
        self._open: dict[str, int] = {}
        """The numbers of open blocks, by what they hold: ``text``, or the number of a call."""
        self._inputs: dict[str, ObjectEnd] = {}
        self._whole = {_TEXT}
        """Of what is open, that which ends as soon as something else begins."""

    async def send(self) -> None:
        """Send all events. Raises: AiscaleError, before anything was sent."""
        async for event in with_silences(self._run.events()):
            if isinstance(event, Finished):
                check_end(self._run, event)
            if not self._exchange.started:
                if event is not None and not isinstance(event, Delta | Finished):
                    continue
                await self._exchange.start_stream(self._run.headers)
                await self._say("message_start", message=_make_message(self._run, STANDARD))
            if event is None:
                await self._say("ping")
            elif isinstance(event, Delta):
                await self._tell(event)
            elif isinstance(event, Finished):
                if not self._blocks:
                    await self._begin(_TEXT, {"type": "text", "text": ""})
                await self._close(set(self._open))
                await self._say(
                    "message_delta", delta=_ending(event, called=bool(self._inputs)), usage=_usage(event, STANDARD)
                )
        await self._say("message_stop")
        await self._exchange.end_stream()

    async def _tell(self, delta: Delta) -> None:
        if delta.text:
            await self._begin(_TEXT, {"type": "text", "text": ""})
            await self._add(_TEXT, {"type": "text_delta", "text": delta.text})
        for part in delta.tool_calls:
            call = str(part.index)
            if call in self._whole:
                # what follows a whole input is none of its call
                continue
            await self._begin(call, _describe_call(part, {}))
            if part.arguments:
                await self._add(call, {"type": "input_json_delta", "partial_json": part.arguments})
            if self._inputs.setdefault(call, ObjectEnd()).find(part.arguments) is not None:
                self._whole.add(call)

    async def _begin(self, what: str, block: dict[str, Any]) -> None:
        if what in self._open:
            return
        await self._close(self._whole)
        self._open[what] = self._blocks
        self._blocks += 1
        await self._say("content_block_start", index=self._open[what], content_block=block)
        if self._blocks == 1:
            await self._say("ping")

    async def _add(self, what: str, delta: dict[str, Any]) -> None:
        await self._say("content_block_delta", index=self._open[what], delta=delta)

    async def _close(self, those: set[str]) -> None:
        for what in [what for what in self._open if what in those]:
            await self._say("content_block_stop", index=self._open.pop(what))

    async def _say(self, kind: str, **fields: Any) -> None:
        await self._exchange.send_event({"type": kind, **fields}, kind)


def _describe_call(call: ToolCallPart, value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": value}


def _make_message(run: Run, tier: str) -> dict[str, Any]:
    return {
        "id": f"msg_{run.job_id.removeprefix('job_')}",
        "type": "message",
        "role": "assistant",
        "model": run.model,
        "content": [],
        "container": None,
        "diagnostics": None,
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "usage": _count(tier, run.prompt_tokens),
    }


def _ending(event: Finished, *, called: bool) -> dict[str, Any]:
    reason, sequence = "tool_use" if called else "end_turn", None
    if event.finish_reason == "length":
        reason = "max_tokens"
    elif event.stop_sequence is not None:
        reason, sequence = "stop_sequence", event.stop_sequence
    # details are of refusals, and containers of tools that run on the server: there are neither
    return {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None, "container": None}


def _usage(event: Finished, tier: str) -> dict[str, Any]:
    return _count(tier, event.prompt_tokens - event.cached_tokens, event.cached_tokens, event.completion_tokens)


def _count(tier: str, fresh_tokens: int, cached_tokens: int = 0, output_tokens: int = 0) -> dict[str, Any]:
    return {
        "input_tokens": fresh_tokens,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
        "server_tool_use": None,
        "service_tier": tier,
        "inference_geo": None,
    }
