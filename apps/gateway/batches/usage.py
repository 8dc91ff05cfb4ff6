"""Add up the tokens that the answers of a batch name as used."""

from typing import Any

from apps.gateway.models import Batch

NOTHING = {"input_tokens": 0, "cached_tokens": 0, "output_tokens": 0}


def read(answer: Any) -> dict[str, int]:
    """Return what an answer of any endpoint says of its usage, by the names of the batch's columns; nothing where it says nothing."""
    told = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(told, dict):
        return {}
    if "prompt_tokens" in told:
        taken, made, details = told["prompt_tokens"], told.get("completion_tokens", 0), "prompt_tokens_details"
    else:
        taken, made, details = told["input_tokens"], told["output_tokens"], "input_tokens_details"
    cached = told.get(details, {}).get("cached_tokens", 0)
    return {"input_tokens": taken, "cached_tokens": cached, "output_tokens": made}


def describe(row: Batch) -> dict[str, Any] | None:
    """Return the usage as OpenAI's clients know it; None for a batch that was begun before it was counted, or whose answers name none."""
    if row.input_tokens is None or row.cached_tokens is None or row.output_tokens is None:
        return None
    return {
        "input_tokens": row.input_tokens,
        "input_tokens_details": {"cached_tokens": row.cached_tokens},
        "output_tokens": row.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": row.input_tokens + row.output_tokens,
    }
