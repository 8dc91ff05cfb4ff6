"""Have an upstream make embeddings: admitted, held, metered and settled like those that our own workers make."""

import asyncio
import time
from typing import Any

import msgspec
import numpy as np

from aiscale.wire.events import Encoded, Started
from aiscale.wire.jobs import EncodeJob
from apps.accounts import callers
from apps.accounts.callers import Caller
from apps.inference import completions, encodings, lanes, relays
from apps.inference.catalog import CatalogModel
from apps.inference.embeddings import EmbeddingRequest, EmbeddingResult
from apps.inference.relays import Relay
from apps.inference.upstream_client import failed, fetch
from apps.inference.upstream_words import read_count
from apps.inference.waiting import Wait
from apps.spend import admission

AROUND_TOKENS = 8
"""The most that a server puts around a text."""
DEADLINE_S = 120


async def relay(request: EmbeddingRequest, model: CatalogModel, caller: Caller) -> EmbeddingResult:
    """Admit a request and have the model's upstream answer it.

    I/O: three Redis trips and HTTP. Raises: AiscaleError, with nothing spent and nothing held.
    """
    route = model.upstream
    assert route is not None
    plan = await callers.get_plan(caller.plan)
    model, plan = lanes.apply(caller, model, plan)
    bound = sum(count_most(entry) + AROUND_TOKENS for entry in request.inputs)
    job_id, deadline_at_ms = lanes.name_job(request.request_id), time.time_ns() // 1_000_000 + DEADLINE_S * 1000
    hold_nanousd = model.terms.cost_nanousd(bound, 0)
    admitted = await admission.admit(
        admission.Ask(
            caller=caller,
            model=model.slug,
            job_id=job_id,
            worst_nanousd=hold_nanousd,
            worst_tokens=bound,
            deadline_at_ms=deadline_at_ms,
            makes_text=False,
            priority=plan.priority,
            provider=route.name,
        )
    )
    tag = completions.make_tag(caller, model, request.request_id, request.source, hold_nanousd, admitted)
    wait = Wait(job_id, deadline_at_ms)
    job = EncodeJob(
        job_id=job_id,
        model=model.slug,
        model_version=model.version,
        inputs=[],
        billing=msgspec.structs.replace(tag, provider=route.name),
        reply_to=wait.process_id,
        deadline_at_ms=deadline_at_ms,
    )
    body: dict[str, Any] = {"model": route.model, "input": request.inputs, "encoding_format": "float"}
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    one = EmbeddingRelay(job, wait, route, body)
    await relays.begin(one, "".join(entry for entry in request.inputs if isinstance(entry, str)))
    try:
        rows = await encodings.receive(wait, admitted.headers)
    finally:
        await wait.close()
    return EmbeddingResult(
        model=model.slug,
        vectors=rows.vectors or b"",
        count=rows.count,
        dimensions=rows.dimensions,
        prompt_tokens=(await one.count())[0],
        headers=admitted.headers,
    )


def count_most(entry: str | list[int]) -> int:
    """Return the most tokens that an input can be for any tokenizer on bytes."""
    return len(entry.encode()) if isinstance(entry, str) else len(entry)


class EmbeddingRelay(Relay):
    """Be the worker of one job whose vectors an upstream makes."""

    async def relay(self) -> None:
        await self.say(Started(job_id=self.job.job_id, seq=self.next_seq(), worker_id=self.worker_id, attempt=1))
        assert self.route is not None
        answer = await fetch(self.route, "/embeddings", self.body)
        vectors, count, dimensions, self.usage = await asyncio.to_thread(read_vectors, answer, len(self.body["input"]))
        encoded = Encoded(
            job_id=self.job.job_id, seq=self.next_seq(), count=count, dimensions=dimensions, vectors=vectors
        )
        self.wait.take(encoded)

    async def count(self) -> tuple[int, int]:
        """Return the tokens of the inputs: the upstream's own figure, else our tokenizer's; none while there is no answer."""
        if self.usage is None:
            return 0, 0
        told, most = read_count(self.usage, "prompt_tokens"), self.job.billing.hold_tokens
        ids = sum(len(entry) for entry in self.body["input"] if isinstance(entry, list))
        return min(self.estimate + ids if told is None else told, most), 0


def read_vectors(answer: bytes, wanted: int) -> tuple[bytes, int, int, dict[str, Any]]:
    """Return float32 vectors in the order of the inputs, their count and width, and the usage as told.

    Raises: AiscaleError (UPSTREAM_FAILED) for anything else than one vector for each input, all of one width.
    """
    try:
        value = msgspec.json.decode(answer)
        rows = sorted(value["data"], key=lambda row: row["index"])
        if [row["index"] for row in rows] != list(range(wanted)):
            raise failed("it did not answer with one vector for each input")
        vectors = np.array([row["embedding"] for row in rows], "<f4")
        usage = value.get("usage")
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise failed("its answer cannot be read") from error
    if vectors.ndim != 2 or not vectors.shape[1] or not np.isfinite(vectors).all():
        raise failed("its answer holds no vectors")
    return vectors.tobytes(), wanted, vectors.shape[1], usage if isinstance(usage, dict) else {}
