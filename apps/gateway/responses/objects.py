"""Build the objects of the Responses API."""

from typing import Any

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
        "completed_at": None,
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
        "prompt_cache_retention": None,
    }


def make_message(item_id: str, text: str | None, status: str) -> dict[str, Any]:
    """Return the message that holds the answer; no content while ``text`` is None."""
    content = [] if text is None else [make_part(text)]
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}


def make_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def make_item_id(response_id: str, place: int = 0) -> str:
    """Name a response's message at a place among its items, always alike."""
    number = response_id.partition("_")[2]
    return f"msg_{number}_{place}" if place else f"msg_{number}"


def make_response_id(request_id: str) -> str:
    """Name a response after its request: a try that died is repeated under the same id."""
    return f"resp_{request_id.partition('_')[2]}"


def make_call_id(response_id: str, index: int) -> str:
    """Name the item of a response's call, always alike."""
    return f"fc_{response_id.partition('_')[2]}_{index}"


def make_call(call: ToolCallPart, response_id: str, status: str) -> dict[str, Any]:
    """Return the item of one call to a tool."""
    said = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
    return {"id": make_call_id(response_id, call.index), "type": "function_call", "status": status, **said}


_STATUSES: dict[str, str] = {"stop": "completed", "length": "incomplete", "cancelled": "cancelled"}


def has_answer(event: Finished) -> bool:
    """Say whether a job's last event leaves an answer, though it be cut short; any other end is a failure."""
    return event.finish_reason in _STATUSES


def end(head: dict[str, Any], output: list[dict[str, Any]], event: Finished) -> dict[str, Any]:
    """Return the response as it is after its job's last event, which leaves an answer (`has_answer`)."""
    status = _STATUSES[event.finish_reason]
    return head | {
        "status": status,
        "completed_at": event.finished_at_ms // 1000 if status == "completed" else None,
        "output": output,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "usage": make_usage(event),
    }


def fail(head: dict[str, Any], error: AiscaleError, made: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the response as it is when no answer came, or only what was ``made`` until then (`make_rest`)."""
    return head | (made or {}) | {"status": "failed", "error": {"code": error.code.value, "message": error.message}}


def make_rest(output: list[dict[str, Any]], event: Finished) -> dict[str, Any]:
    """Return what there is, and is paid for, of an answer that was ended from outside."""
    return {"output": output, "usage": make_usage(event)} if event.completion_tokens else {}


def make_usage(event: Finished) -> dict[str, Any]:
    return {
        "input_tokens": event.prompt_tokens,
        "input_tokens_details": {"cached_tokens": event.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": event.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": event.prompt_tokens + event.completion_tokens,
    }
