"""Make what the benchmarks ask for: texts by Zipf's law or few ones, embeddings beside classifications, each with one of many keys."""

import functools
import itertools
import json
import random
from collections.abc import Iterable, Iterator

from deploy.bench.load import make_request
from deploy.bench.stack import HOST

MODEL = "all-minilm-l6-v2"
VOCABULARY, EXPONENT = 20_000, 1.2
"""Texts, and how much more often the first ones are asked for: some four of five requests were asked before, soon after the start."""
FEW = 40
"""So many texts are asked for again and again where all answers are to be known."""
CLASSIFIED = 4
"""One of so many mixed requests is a classification, the others are embeddings."""

Order = tuple[str, str, bytes]
"""Key, path, JSON body."""


def list_known(keys: list[str], chance: random.Random) -> list[Order]:
    """Ask for few texts with all keys, in an order by chance."""
    orders = [(key, *embed(rank)) for key in keys for rank in range(FEW)]
    chance.shuffle(orders)
    return orders


def iter_mixed(keys: list[str], chance: random.Random) -> Iterator[Order]:
    """Ask without end for texts by Zipf's law, each with a key by chance."""
    ranks = itertools.cycle(draw_zipf(chance, 200_000))
    for number, rank in enumerate(ranks):
        yield chance.choice(keys), *(classify(rank) if number % CLASSIFIED == 0 else embed(rank))


@functools.cache
def embed(rank: int) -> tuple[str, bytes]:
    body = {"model": MODEL, "input": make_text(rank), "encoding_format": "base64"}
    return "/v1/embeddings", json.dumps(body).encode()


@functools.cache
def classify(rank: int) -> tuple[str, bytes]:
    return "/v1/moderations", json.dumps({"input": make_text(rank)}).encode()


def write(orders: Iterable[Order]) -> Iterator[bytes]:
    """Write orders out as HTTP requests."""
    return (make_request(HOST, path, key, body) for key, path, body in orders)


def make_text(rank: int) -> str:
    """Return a text of about twenty tokens that is this rank's own."""
    words = ("river", "engine", "purple", "contract", "window", "signal", "garden", "metric", "silent", "orbit")
    chance = random.Random(rank)  # noqa: S311 - a text, no secret
    return f"Question {rank}: " + " ".join(chance.choice(words) for _ in range(12)) + "?"


def draw_zipf(chance: random.Random, count: int) -> list[int]:
    """Draw ranks by Zipf's law a few texts are asked all the time, most ones once."""
    weights = [1 / (rank + 1) ** EXPONENT for rank in range(VOCABULARY)]
    return [1_000 + rank for rank in chance.choices(range(VOCABULARY), weights, k=count)]
