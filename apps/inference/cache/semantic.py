"""Answer what was asked in other words: for organizations that wish it, a chat's last message need only be alike, all else the same.

The last message is turned into numbers by our own worker, at no cost to the caller, and compared with what the organization's other
chats of the same model, version, earlier messages and sampling were asked. How alike is enough each entry learns for itself
(`thresholds`): where that is not sure yet, the model is asked, and its answer compared with the one that is kept.
"""

import asyncio
import hashlib
import logging
import random
import time
from functools import partial
from typing import Any

import msgspec
import numpy as np
from django.db import Error as DatabaseError

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.redis import PerLoop
from apps.accounts.callers import Caller, PlanLimits, on_thread
from apps.inference import catalog, encodings, presence, prompts
from apps.inference.cache import lessons, policy, vectors
from apps.inference.cache.entries import Answer, decode_answer, encode_answer
from apps.inference.cache.lessons import Nearest, Place
from apps.inference.cache.store import MAX_VALUE_BYTES
from apps.inference.catalog import CatalogModel
from apps.inference.completions import CompletionRequest

log = logging.getLogger(__name__)

HEADER = "x-aiscale-cache-similarity"
DIMENSIONS = 384
SAME_ANSWER = 0.9
"""Two answers whose vectors are so alike count as the same; so do equal ones, whatever their case and spaces."""
DEADLINE_S = 1.0
"""How long a look-up may take: then it is a miss."""
LEARN_DEADLINE_S = 10.0
REST_S = 5.0
"""How long nothing is looked up after a failure: a worker that hangs must not cost each request its deadline."""
REST_AFTER = 3
"""Look-ups in a row that took too long; one alone does so on any busy machine."""
MAX_LOOKING, MAX_LEARNING = 32, 100
"""At once, in this process; what comes beyond is a miss, and is not learned."""
MAX_DECIDING = 2
"""Of those that look, how many ask the database at a time: it goes through all entries of a place, which takes a core, and the threads
and connections that wait for it are all that the process has."""
UNANSWERED = frozenset({Code.BACKEND_UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.WORKER_LOST})
PROMPT_SUFFIX, ANSWER_SUFFIX = "_s", "_sa"

_rests_until = 0.0
_looking = _late = 0
_deciding = PerLoop(lambda: asyncio.Semaphore(MAX_DECIDING))
_learning: set[asyncio.Task[None]] = set()
_draw = random.SystemRandom().random


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """Hold what was looked for: whose request, where, and the numbers of its last message (float32, ``[DIMENSIONS]``)."""

    request: CompletionRequest
    caller: Caller
    encoder: CatalogModel
    place: Place
    vector: Any
    nearest: Nearest | None


def is_wished(request: CompletionRequest, caller: Caller, plan: PlanLimits) -> bool:
    """Tell whether this request may be given the answer to another one.

    Never without the organization's wish, for tools, a seed, a grammar, log-probabilities, several choices or a browser's chat; nor
    where messages are screened, because what was said in other words was not.
    """
    if caller.semantic_max_error_percent is None or request.source != "api" or plan.moderation != "off":
        return False
    odd = (request.tools, request.seed, request.grammar, request.top_logprobs, request.words, request.prompt_token_ids)
    if any(value is not None for value in odd) or request.n != 1 or request.keep_log or not request.cache.read:
        return False
    return bool(request.messages) and request.messages[-1].role == "user" and bool(request.messages[-1].content.strip())


async def look(
    request: CompletionRequest, caller: Caller, model: CatalogModel, plan: PlanLimits, generation: str
) -> Asked | None:
    """Look for an answer to an alike question; it is to be given when ``nearest.is_given``. None when nothing can be told.

    ``model`` and ``plan`` as they hold for the caller's lane. Never raises, and takes `DEADLINE_S` at the most.
    I/O: as `vectors.find`, an encoder job for a text that is not known, one SQL transaction.
    """
    global _looking, _late
    if time.monotonic() < _rests_until or _looking >= MAX_LOOKING:
        return None
    _looking += 1
    try:
        async with asyncio.timeout(DEADLINE_S):
            found = await _look(request, caller, model, plan, generation)
        _late = 0
        return found
    except (AiscaleError, *redis_clients.UNAVAILABLE, DatabaseError, TimeoutError) as error:
        _note_failure(error)
        return None
    finally:
        _looking -= 1


def _note_failure(error: Exception) -> None:
    """Let look-ups rest where the next one would fare no better."""
    global _rests_until, _late
    _late = _late + 1 if isinstance(error, TimeoutError) else 0
    # a text that the encoder refuses says nothing of the next one
    is_refused = isinstance(error, AiscaleError) and error.code not in UNANSWERED
    if not is_refused and not 0 < _late < REST_AFTER:
        _rests_until = time.monotonic() + REST_S
    log.warning("nothing alike was looked for: %s", str(error) or "it took too long")


def learn(asked: Asked, answer: Answer) -> None:
    """Compare the model's answer with the one that was kept, or keep it, in the background. What a process takes with it is not learned."""
    if answer.pieces and len(_learning) < MAX_LEARNING:
        task = asyncio.create_task(_learn(asked, answer), name="semantic-lesson")
        _learning.add(task)
        task.add_done_callback(_learning.discard)


async def finish() -> None:
    """Wait for what is being learned."""
    while _learning:
        await asyncio.wait(set(_learning))


def forget() -> None:
    """Drop what is known of failures."""
    global _rests_until, _late
    _rests_until, _late = 0.0, 0


async def _look(
    request: CompletionRequest, caller: Caller, model: CatalogModel, plan: PlanLimits, generation: str
) -> Asked | None:
    encoder = await _find_encoder()
    if encoder is None:
        return None
    inputs = await prompts.encode_texts(encoder, [request.messages[-1].content])
    if len(inputs[0]) > encoder.context_tokens:
        # its end would not count
        return None
    known = await vectors.find(policy.EVERYTHING, encoder, plan, caller, inputs)
    try:
        if known.missing:
            rows = await _encode(encoder, known.missing, request, caller, PROMPT_SUFFIX, DEADLINE_S)
            known.fill(rows.data, rows.dimensions)
    finally:
        await known.close()
    vector = np.frombuffer(known.join(), "<f4")
    place = Place(
        organization_id=caller.organization_id,
        model=model.slug,
        version=model.version,
        context=_hash_context(request, caller, model, plan, encoder, generation),
    )
    rate = float(caller.semantic_max_error_percent or 0) / 100
    async with _deciding.get():
        nearest = await on_thread(partial(lessons.decide, place, vector, rate, _draw()))
    return Asked(request=request, caller=caller, encoder=encoder, place=place, vector=vector, nearest=nearest)


def _hash_context(
    request: CompletionRequest,
    caller: Caller,
    model: CatalogModel,
    plan: PlanLimits,
    encoder: CatalogModel,
    generation: str,
) -> bytes:
    """Return 32 bytes that stand for all that shapes the answer but the last message, and for who may share it (C1)."""
    # the whole request, so that what is added to it one day counts too
    rest = msgspec.structs.replace(
        request,
        request_id="",
        source="api",
        job_id=None,
        cache=policy.EVERYTHING,
        messages=request.messages[:-1],
        logit_bias=dict(sorted(request.logit_bias.items())),
    )
    scope = policy.name_scope("key" if plan.cache_scope == "key" else "organization", caller)
    route = "" if model.upstream is None else f"{model.upstream.base_url} {model.upstream.model}"
    parts = [scope, generation, route, encoder.slug, encoder.version, plan.max_output_tokens, rest]
    return hashlib.blake2b(msgspec.msgpack.encode(parts), digest_size=32).digest()


async def _learn(asked: Asked, answer: Answer) -> None:
    nearest, value = asked.nearest, encode_answer(answer)
    try:
        is_right = False
        if nearest is not None:
            is_right = await _is_same(decode_answer(nearest.value), answer, asked)
            await on_thread(partial(lessons.observe, nearest.entry_id, nearest.similarity, is_right))
        if not is_right and len(value) <= MAX_VALUE_BYTES:
            await on_thread(partial(lessons.add, asked.place, asked.vector, value))
    except (AiscaleError, *redis_clients.UNAVAILABLE, DatabaseError, TimeoutError, msgspec.MsgspecError) as error:
        log.warning("nothing was learned from an answer: %s", error)


async def _is_same(known: Answer, made: Answer, asked: Asked) -> bool:
    texts = [known.pieces[0].text, made.pieces[0].text]
    one, other = (" ".join(text.casefold().split()) for text in texts)
    if one == other:
        return True
    if not (one and other):
        return False
    inputs = await prompts.encode_texts(asked.encoder, texts)
    if max(map(len, inputs)) > asked.encoder.context_tokens:
        # their ends would not count: only equal ones are the same
        return False
    rows = await _encode(asked.encoder, inputs, asked.request, asked.caller, ANSWER_SUFFIX, LEARN_DEADLINE_S)
    first, second = np.frombuffer(rows.data, "<f4").reshape(2, -1)
    return float(first @ second) >= SAME_ANSWER


async def _encode(
    encoder: CatalogModel,
    inputs: list[list[int]],
    request: CompletionRequest,
    caller: Caller,
    suffix: str,
    deadline_s: float,
) -> encodings.Rows:
    return await encodings.encode_for_us(
        encoder,
        inputs,
        caller,
        request_id=request.request_id,
        source=request.source,
        suffix=suffix,
        deadline_s=deadline_s,
    )


async def _find_encoder() -> CatalogModel | None:
    """Return an embedding model that our workers serve now."""
    for model in await catalog.list_local("embed"):
        if model.dimensions == DIMENSIONS and await presence.is_served(model.slug, model.version):
            return model
    return None
