"""Answer ``POST /v1/embeddings``."""

import asyncio
import base64
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import Caller
from apps.gateway import parameters
from apps.gateway.cache_wishes import CacheOption, read_wish
from apps.gateway.exchange import Exchange
from apps.inference import catalog, embeddings
from apps.inference.embeddings import EmbeddingRequest, EmbeddingResult

THREAD_FROM_COUNT = 64
"""From so many vectors on, writing them out takes longer than going to a thread."""


class EmbeddingBody(msgspec.Struct, kw_only=True):
    """The parameters that are honoured."""

    model: str
    input: Annotated[Any, msgspec.Meta(extra_json_schema=parameters.TEXTS_OR_TOKENS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    cache: CacheOption | None = None


async def answer_embeddings(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Embed all inputs of one request. Raises: AiscaleError."""
    wanted = parameters.convert(
        parameters.read_object(body), EmbeddingBody, harmless=frozenset({"user"}), defaults_only={}
    )
    inputs = read_inputs(wanted.input)
    if wanted.dimensions is not None:
        model = await catalog.get_model(wanted.model, "embed")
        if wanted.dimensions < 1 or (wanted.dimensions != model.dimensions and model.upstream is None):
            raise AiscaleError(
                Code.INVALID_REQUEST,
                f"dimensions is {wanted.dimensions}; {model.slug} makes vectors of {model.dimensions} only.",
                param="dimensions",
            )
    request = EmbeddingRequest(
        request_id=exchange.request_id,
        source="api",
        model=wanted.model,
        inputs=inputs,
        cache=read_wish(exchange, wanted.cache),
        dimensions=wanted.dimensions,
    )
    result = await embeddings.embed(request, caller)
    if result.count < THREAD_FROM_COUNT:
        value = write_list(result, wanted.encoding_format)
    else:
        value = await asyncio.to_thread(write_list, result, wanted.encoding_format)
    await exchange.send_json(200, value, result.headers)


def read_inputs(value: Any) -> list[str] | list[list[int]]:
    """Take a text, texts, token ids, or lists of token ids. Raises: AiscaleError (INVALID_REQUEST)."""
    many: Any = value
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        many = [value]
    if not isinstance(many, list):
        raise _bad("input must be a string, an array of strings, or an array of token ids")
    if not 1 <= len(many) <= embeddings.MAX_INPUTS:
        raise _bad(f"input holds {len(many)} entries; send 1 to {embeddings.MAX_INPUTS} at a time")
    kind: Any = str if isinstance(many[0], str) else list
    for index, entry in enumerate(many):
        if not isinstance(entry, kind) or not isinstance(entry, str | list):
            raise _bad(f"input[{index}] is of another type; all entries must be strings, or all arrays of token ids")
        if not entry:
            raise _bad(f"input[{index}] is empty")
        if isinstance(entry, list) and not all(type(token_id) is int for token_id in entry):
            raise _bad(f"input[{index}] holds something that is no token id")
    return many


def write_list(result: EmbeddingResult, encoding_format: str) -> dict[str, Any]:
    """Put vectors into OpenAI's list object."""
    size = result.dimensions * 4
    rows: list[Any]
    if encoding_format == "base64":
        rows = [
            base64.b64encode(result.vectors[i * size : (i + 1) * size]).decode("ascii") for i in range(result.count)
        ]
    else:
        rows = np.frombuffer(result.vectors, "<f4").reshape(result.count, result.dimensions).tolist()
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "model": result.model,
        "usage": {
            "prompt_tokens": result.prompt_tokens,
            "total_tokens": result.prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": result.cached_tokens},
        },
    }


def _bad(what: str) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, f"{what}.", param="input")
