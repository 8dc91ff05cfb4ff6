"""Build the objects of the Responses API."""

from typing import Any

from aiscale.db import make_public_id
from aiscale.errors import AiscaleError
from aiscale.wire.events import Finished, ToolCallPart
from apps.gateway.responses.schema import ResponseBody
from apps.inference.completions import Run


def make_head(wanted: ResponseBody, run: Run, response_id: str) -> dict[str, Any]:
    """Return a response of which nothing is known yet but what was asked for."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": run.created_at_s,
        "status": "in_progress",
        "background": wanted.background,
        "error": None,
        "incomplete_details": None,
        "instructions": wanted.instructions,
        "max_output_tokens": wanted.max_output_tokens,
        "max_tool_calls": None,
        "metadata": wanted.metadata,
        "model": run.model,
        "output": [],
        "parallel_tool_calls": wanted.parallel_tool_calls is not False,
        "previous_response_id": wanted.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": wanted.store,
        "temperature": wanted.temperature,
        "text": {"format": wanted.text.format},
        "tool_choice": wanted.tool_choice or "auto",
        "tools": wanted.tools,
        "top_logprobs": 0,
        "top_p": wanted.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": wanted.user,
        "safety_identifier": wanted.safety_identifier,
        "prompt_cache_key": wanted.prompt_cache_key,
    }


def make_message(item_id: str, text: str | None, status: str) -> dict[str, Any]:
    """Return the message that holds the answer; no content while ``text`` is None."""
    content = [] if text is None else [make_part(text)]
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}


def make_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def make_item_id(response_id: str) -> str:
    """Name a response's message, always alike."""
    return f"msg_{response_id.partition('_')[2]}"


def make_response_id() -> str:
    return make_public_id("resp")


def make_call(call: ToolCallPart, response_id: str, status: str) -> dict[str, Any]:
    """Return the item of one call to a tool."""
    item_id = f"fc_{response_id.partition('_')[2]}_{call.index}"
    said = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
    return {"id": item_id, "type": "function_call", "status": status, **said}


def end(
    head: dict[str, Any], text: str, event: Finished, calls: list[ToolCallPart], *, text_at: int = 0
) -> dict[str, Any]:
    """Return the response as it is after its job's last event. ``event`` ended it well, or was cancelled or killed.

    ``text_at`` is the place of the text among the calls.
    """
    whole = event.finish_reason == "stop"
    status = "completed" if whole else "cancelled" if event.finish_reason == "cancelled" else "incomplete"
    output = [make_call(call, head["id"], "completed") for call in calls]
    if text or not calls:
        output.insert(text_at, make_message(make_item_id(head["id"]), text, "completed" if whole else "incomplete"))
    reason = {"length": "max_output_tokens"}.get(event.finish_reason, event.finish_reason)
    return head | {
        "status": status,
        "output": output,
        "incomplete_details": {"reason": reason} if status == "incomplete" else None,
        "usage": make_usage(event),
    }


def fail(head: dict[str, Any], error: AiscaleError) -> dict[str, Any]:
    """Return the response as it is when no answer came."""
    return head | {"status": "failed", "error": {"code": error.code.value, "message": error.message}}


def make_usage(event: Finished) -> dict[str, Any]:
    return {
        "input_tokens": event.prompt_tokens,
        "input_tokens_details": {"cached_tokens": event.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": event.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": event.prompt_tokens + event.completion_tokens,
    }
