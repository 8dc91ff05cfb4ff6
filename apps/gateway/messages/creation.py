"""Answer ``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from typing import Any

from aiscale.wire.events import Delta, Finished
from apps.accounts.callers import Caller
from apps.gateway.exchange import Exchange
from apps.gateway.messages.schema import Conversation, MessagesBody, check_version, read_count, read_messages
from apps.gateway.streaming import check_end, read_whole, with_silences
from apps.inference import catalog, completions, prompts
from apps.inference.catalog import CatalogModel
from apps.inference.completions import CompletionRequest, Run


async def answer_messages(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Answer a conversation, streamed or whole. Raises: AiscaleError before the first byte."""
    check_version(exchange)
    wanted, conversation = read_messages(body)
    model = await catalog.get_model(wanted.model, "generate")
    request = CompletionRequest(
        request_id=exchange.request_id,
        source="api",
        model=wanted.model,
        messages=conversation.messages,
        prompt_token_ids=await _continue(model, conversation) if conversation.prefill else None,
        max_tokens=wanted.max_tokens,
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        top_p=wanted.top_p,
        stop=tuple(wanted.stop_sequences),
    )
    async with await completions.start(request, caller) as run:
        if wanted.stream:
            await _stream(exchange, wanted, run)
        else:
            text, event = await read_whole(run)
            content = [{"type": "text", "text": text}]
            ending = _ending(event)
            value = _make_message(run) | {"content": content, **ending, "usage": _usage(event)}
            await exchange.send_json(200, value, run.headers)


async def answer_count(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Count the tokens of a conversation, as they would be charged. Costs nothing. Raises: AiscaleError."""
    check_version(exchange)
    wanted, conversation = read_count(body)
    model = await catalog.get_model(wanted.model, "generate")
    tokens = await _continue(model, conversation)
    await exchange.send_json(200, {"input_tokens": len(tokens)})


async def _continue(model: CatalogModel, conversation: Conversation) -> list[int]:
    """Return the prompt, up to and with the words that the answer begins with."""
    before = await prompts.build_prompt(model, conversation.messages)
    if not conversation.prefill:
        return before
    return [*before, *await prompts.encode_prompt(model, conversation.prefill)]


async def _stream(exchange: Exchange, wanted: MessagesBody, run: Run) -> None:
    async def say(kind: str, **fields: Any) -> None:
        await exchange.send_event({"type": kind, **fields}, kind)

    async for event in with_silences(run.events()):
        if isinstance(event, Finished):
            check_end(run, event)
        if not exchange.started:
            if event is not None and not isinstance(event, Delta | Finished):
                continue
            await exchange.start_stream(run.headers)
            await say("message_start", message=_make_message(run))
            await say("content_block_start", index=0, content_block={"type": "text", "text": ""})
            await say("ping")
        if event is None:
            await say("ping")
        elif isinstance(event, Delta) and event.text:
            await say("content_block_delta", index=0, delta={"type": "text_delta", "text": event.text})
        elif isinstance(event, Finished):
            await say("content_block_stop", index=0)
            await say("message_delta", delta=_ending(event), usage=_usage(event))
    await say("message_stop")
    await exchange.end_stream()


def _make_message(run: Run) -> dict[str, Any]:
    return {
        "id": f"msg_{run.job_id.removeprefix('job_')}",
        "type": "message",
        "role": "assistant",
        "model": run.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": run.prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
            "service_tier": "standard",
        },
    }


def _ending(event: Finished) -> dict[str, Any]:
    if event.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if event.stop_sequence is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": event.stop_sequence}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage(event: Finished) -> dict[str, Any]:
    return {
        "input_tokens": event.prompt_tokens - event.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": event.cached_tokens,
        "output_tokens": event.completion_tokens,
        "service_tier": "standard",
    }
