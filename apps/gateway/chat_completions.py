"""Answer ``POST /v1/chat/completions``."""

from typing import Any

import msgspec

from aiscale.wire.events import Delta, Finished
from apps.accounts.callers import Caller
from apps.gateway import obfuscation
from apps.gateway.cache_wishes import read_wish
from apps.gateway.chat_choices import Choices, describe_logprobs, describe_part, describe_piece, word_end
from apps.gateway.chat_schema import ChatBody, read_chat
from apps.gateway.exchange import Exchange
from apps.gateway.streaming import COMMENT, with_silences
from apps.inference import completions
from apps.inference.completions import Run
from apps.inference.endings import make_failure


async def answer_chat(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Run one completion, streamed or whole. Raises: AiscaleError before the first byte."""
    chat, request = read_chat(body, exchange.request_id)
    request = msgspec.structs.replace(request, cache=read_wish(exchange, chat.cache))
    async with await completions.start(request, caller) as run:
        if chat.stream:
            await _stream(exchange, chat, run)
        else:
            await _answer_whole(exchange, chat, run)


async def _answer_whole(exchange: Exchange, chat: ChatBody, run: Run) -> None:
    choices = Choices(run.n)
    async for event in run.events():
        if isinstance(event, Delta):
            choices.take(event)
        elif isinstance(event, Finished):
            if event.finish_reason not in ("stop", "length"):
                raise make_failure(event, run.headers)
            described = choices.describe(event, with_logprobs=chat.logprobs)
            value = _head(run, "chat.completion") | {"choices": described, "usage": _usage(event)}
            await exchange.send_json(200, value, run.headers)


async def _stream(exchange: Exchange, chat: ChatBody, run: Run) -> None:
    with_usage = chat.stream_options is not None and chat.stream_options.include_usage
    exchange.obfuscates = obfuscation.is_wished(chat.stream_options)
    head = _head(run, "chat.completion.chunk") | ({"usage": None} if with_usage else {})
    called: set[int] = set()
    async for event in with_silences(run.events()):
        if isinstance(event, Finished) and event.finish_reason not in ("stop", "length"):
            raise make_failure(event, run.headers)
        if not exchange.started and not isinstance(event, Delta | Finished | None):
            continue
        if not exchange.started:
            # whatever could go wrong before the first token had its own status until here
            await exchange.start_stream(run.headers)
            for index in range(run.n):
                first = {"role": "assistant", "content": "", "refusal": None}
                await exchange.send_event(head | describe_piece(index, first))
        if event is None:
            await exchange.send_part(COMMENT)
        elif isinstance(event, Delta):
            if event.tool_calls:
                called.add(event.index)
            await _send_delta(exchange, head, chat, event, called)
        elif isinstance(event, Finished):
            if run.n == 1:
                await exchange.send_event(
                    head | describe_piece(0, {}, finish_reason=word_end(event.finish_reason, called=bool(called)))
                )
            if with_usage:
                await exchange.send_event(head | {"choices": [], "usage": _usage(event)})
    await exchange.end_stream(b"data: [DONE]\n\n")


async def _send_delta(exchange: Exchange, head: dict[str, Any], chat: ChatBody, delta: Delta, called: set[int]) -> None:
    if delta.text or delta.logprobs:
        logprobs = describe_logprobs(list(delta.logprobs)) if chat.logprobs else None
        await exchange.send_event(head | describe_piece(delta.index, {"content": delta.text}, logprobs))
    if delta.tool_calls:
        parts = [describe_part(part) for part in delta.tool_calls]
        await exchange.send_event(head | describe_piece(delta.index, {"tool_calls": parts}))
    if delta.end is not None:
        reason = word_end(delta.end, called=delta.index in called)
        await exchange.send_event(head | describe_piece(delta.index, {}, finish_reason=reason))


def _head(run: Run, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{run.job_id.removeprefix('job_')}",
        "object": kind,
        "created": run.created_at_s,
        "model": run.model,
        "system_fingerprint": f"fp_{run.model_version}",
        "service_tier": "default",
    }


def _usage(event: Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": event.prompt_tokens,
        "completion_tokens": event.completion_tokens,
        "total_tokens": event.prompt_tokens + event.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": event.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
