"""Describe what is cached, and derive the key under which it lies."""

import hashlib
from typing import Literal

import msgspec

from aiscale.wire.events import TokenLogprob

Level = Literal["l1", "l2", "l3", "semantic", "miss"]

SCHEMA = 1
"""Raise it when `Answer` changes shape: older entries are then not found."""


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Hold the whole text of one choice, and how it ended."""

    index: int
    text: str
    end: Literal["stop", "length"]
    logprobs: tuple[TokenLogprob, ...] = ()


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """Hold one completion: its choices and its real token counts, for usage and for the price of a hit."""

    pieces: tuple[Piece, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    stop_sequence: str | None = None


_encoder = msgspec.msgpack.Encoder()
_answers = msgspec.msgpack.Decoder(Answer)


def encode_answer(answer: Answer) -> bytes:
    return _encoder.encode(answer)


def decode_answer(data: bytes) -> Answer:
    """Raises: msgspec.DecodeError or ValidationError."""
    return _answers.decode(data)


def derive_key(scope: str, generation: str, model: str, version: str, sampling: object, token_ids: list[int]) -> bytes:
    """Return 32 bytes that stand for exactly this request. Whatever could change the answer, or who may see it, goes in (C1, C2).

    ``scope`` is a key's, an organization's or the site's name; ``sampling`` is a struct without what never changes an answer.
    """
    parts = [SCHEMA, scope, generation, model, version, sampling, token_ids]
    return hashlib.blake2b(_encoder.encode(parts), digest_size=32).digest()
