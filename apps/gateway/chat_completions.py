"""Answer ``POST /v1/chat/completions``."""

from typing import Any

from aiscale.wire.events import Delta, Finished
from apps.accounts.callers import Caller
from apps.gateway.chat_schema import ChatBody, read_chat
from apps.gateway.exchange import Exchange
from apps.gateway.streaming import COMMENT, with_silences
from apps.inference import completions
from apps.inference.completions import Run
from apps.inference.endings import make_failure


async def answer_chat(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Run one completion, streamed or whole. Raises: AiscaleError before the first byte."""
    chat, request = read_chat(body, exchange.request_id)
    async with await completions.start(request, caller) as run:
        if chat.stream:
            await _stream(exchange, chat, run)
        else:
            await _answer_whole(exchange, run)


async def _answer_whole(exchange: Exchange, run: Run) -> None:
    text: list[str] = []
    async for event in run.events():
        if isinstance(event, Delta):
            text.append(event.text)
        elif isinstance(event, Finished):
            if event.finish_reason not in ("stop", "length"):
                raise make_failure(event, run.headers)
            message: dict[str, Any] = {
                "role": "assistant",
                "content": "".join(text),
                "refusal": None,
                "annotations": [],
            }
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": event.finish_reason}
            value = _head(run, "chat.completion") | {"choices": [choice], "usage": _usage(event)}
            await exchange.send_json(200, value, run.headers)


async def _stream(exchange: Exchange, chat: ChatBody, run: Run) -> None:
    with_usage = chat.stream_options is not None and chat.stream_options.include_usage
    head = _head(run, "chat.completion.chunk") | ({"usage": None} if with_usage else {})
    async for event in with_silences(run.events()):
        if isinstance(event, Finished) and event.finish_reason not in ("stop", "length"):
            raise make_failure(event, run.headers)
        if not exchange.started and not isinstance(event, Delta | Finished | None):
            continue
        if not exchange.started:
            # whatever could go wrong before the first token had its own status until here
            await exchange.start_stream(run.headers)
            await exchange.send_event(head | _choice({"role": "assistant", "content": "", "refusal": None}))
        if event is None:
            await exchange.send_part(COMMENT)
        elif isinstance(event, Delta):
            await exchange.send_event(head | _choice({"content": event.text}))
        elif isinstance(event, Finished):
            await exchange.send_event(head | _choice({}, event.finish_reason))
            if with_usage:
                await exchange.send_event(head | {"choices": [], "usage": _usage(event)})
    await exchange.end_stream(b"data: [DONE]\n\n")


def _head(run: Run, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{run.job_id.removeprefix('job_')}",
        "object": kind,
        "created": run.created_at_s,
        "model": run.model,
        "system_fingerprint": f"fp_{run.model_version}",
        "service_tier": "default",
    }


def _choice(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]}


def _usage(event: Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": event.prompt_tokens,
        "completion_tokens": event.completion_tokens,
        "total_tokens": event.prompt_tokens + event.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }
