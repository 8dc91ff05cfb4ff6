"""Hold everything that one worker process serves: a thread for each model, and the jobs in hand."""

import logging
import threading
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from aiscale.observability import ENCODER_BATCH_TEXTS, ENGINE_STEP_SECONDS, ENGINE_TOKENS, ENGINE_WAITING
from aiscale.wire import scopes
from aiscale.wire.jobs import EncodeJob, GenerateJob
from aiscale.wire.manifest import TOKENIZER_FILE, Manifest
from workers.config import ENV, list_served
from workers.engine.encoding import BatchReport, EncoderThread, EncodeTask
from workers.engine.engine import Engine
from workers.engine.runner_fake import FakeEncoder
from workers.engine.sequence import Sequence
from workers.engine.vocabulary import Vocabulary
from workers.generation import Generation
from workers.generators import open_engine
from workers.lanes import Lanes
from workers.publish import JobInHand, Publisher

log = logging.getLogger(__name__)

ENCODER_LANES = 3
"""One batch is computed while the next one is fetched, and a large job does not keep all others out."""

_serving: "Serving | None" = None
_ready = threading.Event()


class Serving:
    """Serve the models of this worker. Methods may be called from any thread."""

    def __init__(self) -> None:
        """I/O: loads every model."""
        self.publisher = Publisher()
        self.jobs: dict[str, JobInHand] = {}
        self.versions: dict[str, str] = {}
        self.providers: list[str] = _choose_providers()
        self.started_at_ms = time.time_ns() // 1_000_000
        self.closing = False
        self.draining = False
        """Whether the worker was told to stop: it takes no more jobs."""
        self.lanes: dict[str, Lanes] = {}
        self._vocabularies: dict[str, Vocabulary] = {}
        self.orders: dict[str, scopes.Order] = {}
        """What is stopped, by scope, as this worker has heard it."""
        self._engines: dict[str, Engine] = {}
        self._encoders: dict[str, EncoderThread] = {}
        for directory, manifest in list_served():
            self._load(directory, manifest)

    def submit(self, in_hand: JobInHand) -> None:
        """Start a claimed job. Whatever cannot be started ends as an error."""
        job = in_hand.job
        self.take(in_hand)
        try:
            if isinstance(job, GenerateJob):
                self.publisher.start_job(in_hand)
                self._engines[job.model].submit(self._make_sequence(in_hand, job))
            else:
                self._encoders[job.model].submit(self._make_encode_task(in_hand, job))
        except KeyError:
            self.publisher.finish(in_hand, "error", error=f"this worker does not serve the model {job.model!r}")
        except (ValueError, RuntimeError) as error:
            self.publisher.finish(in_hand, "error", error=str(error))

    def take(self, in_hand: JobInHand) -> None:
        self.jobs[in_hand.job.job_id] = in_hand

    def forget(self, job_id: str) -> None:
        self.jobs.pop(job_id, None)

    def abort(self, job_id: str, reason: Any, message: str | None = None) -> None:
        """End a job at its engine's next step, if it is here."""
        in_hand = self.jobs.get(job_id)
        if in_hand is None:
            return
        if isinstance(in_hand.job, GenerateJob):
            engine = self._engines.get(in_hand.job.model)
            if engine is not None:
                engine.abort(job_id, reason, message)
        elif in_hand.job.model in self._encoders:
            self._encoders[in_hand.job.model].abort(job_id, f"{reason}: {message or ''}")

    def find_order(self, job: GenerateJob | EncodeJob) -> scopes.Order | None:
        """Return the order that stops a job, if there is one. I/O: none."""
        covering = scopes.list_scopes(job) + [f"provider:{name}" for name in self.providers]
        return scopes.find_order(self.orders, covering, time.time_ns() // 1_000_000)

    def counts(self) -> tuple[int, int]:
        """Return (running, waiting) over all models."""
        both = [thread.counts() for thread in self._threads().values()]
        return sum(pair[0] for pair in both), sum(pair[1] for pair in both)

    def find_dead(self) -> str | None:
        """Name a model whose thread is gone."""
        return next((name for name, thread in self._threads().items() if not thread.is_alive), None)

    def _threads(self) -> dict[str, Engine | EncoderThread]:
        return {**self._engines, **self._encoders}

    def close(self) -> None:
        """Stop all threads; jobs that still run end as errors, those that said nothing yet are left to the reaper."""
        self.closing = self.draining = True
        for thread in self._threads().values():
            thread.stop()
        self.publisher.flush(5.0)

    def _load(self, directory: Path, manifest: Manifest) -> None:
        started = time.monotonic()
        name = manifest.name
        if manifest.kind == "generate":
            self._vocabularies[name] = Vocabulary(
                Tokenizer.from_file(str(directory / TOKENIZER_FILE)), manifest.vocab_size, manifest.eos_token_ids
            )
            engine = open_engine(directory, manifest, self.providers)
            engine.start(f"engine-{name}")
            self._engines[name] = engine
        else:
            encoder = EncoderThread(
                _open_encoder(directory, manifest, self.providers),
                max_batch=ENV.encoder_batch,
                max_batch_tokens=ENV.encoder_batch_tokens,
                max_wait_s=ENV.encoder_wait_ms / 1000,
                on_batch=_meter_batches(name),
            )
            encoder.start(f"encoder-{name}")
            self._encoders[name] = encoder
        generates = manifest.kind == "generate"
        self.lanes[name] = Lanes("generate", ENV.engine_slots) if generates else Lanes("encode", ENCODER_LANES)
        self.versions[name] = manifest.version
        log.info("loaded in %.1f s", time.monotonic() - started, extra={"model": name, "event": "model.loaded"})

    def _make_sequence(self, in_hand: JobInHand, job: GenerateJob) -> Sequence:
        engine = self._engines[job.model]
        vocabulary = self._vocabularies[job.model]
        generation = Generation(in_hand, job, vocabulary, self.publisher, engine.abort, lambda: self.closing)
        return generation.make_sequence()

    def _make_encode_task(self, in_hand: JobInHand, job: EncodeJob) -> EncodeTask:
        def on_done(vectors: Any, error: str | None) -> None:
            if vectors is not None:
                in_hand.prompt_tokens = sum(len(text) for text in job.inputs)
                self.publisher.add_vectors(in_hand, vectors)
                self.publisher.finish(in_hand, "stop")
            elif self.closing:
                self.publisher.drop(in_hand)
            else:
                reason = (error or "").partition(":")[0]
                known = reason if reason in ("cancelled", "killed", "deadline") else "error"
                self.publisher.finish(in_hand, known, error=error)  # type: ignore[arg-type]

        return EncodeTask(job_id=job.job_id, texts=job.inputs, on_done=on_done, deadline_s=job.deadline_at_ms / 1000)


def open_serving() -> Serving:
    """Load everything and start the heartbeat, once a process."""
    from workers.control import start_control

    global _serving
    if _serving is None:
        _serving = Serving()
        start_control(_serving)
        _ready.set()
    return _serving


def get_serving() -> Serving:
    """Return this process's models, waiting until they are loaded."""
    _ready.wait()
    assert _serving is not None
    return _serving


def drain_serving() -> None:
    """Take no more jobs from the queue."""
    if _serving is not None:
        _serving.draining = True


def close_serving() -> None:
    if _serving is not None and not _serving.closing:
        _serving.close()


def _choose_providers() -> list[str]:
    if ENV.engine_runner == "fake":
        return ["fake"]
    import onnxruntime

    from workers.engine.providers import UnknownProvider, choose_providers

    try:
        return choose_providers(ENV.execution_providers, onnxruntime.get_available_providers())
    except UnknownProvider as error:
        raise SystemExit(f"aiscale: the setting AISCALE_EXECUTION_PROVIDERS: {error}") from error


def _open_encoder(directory: Path, manifest: Manifest, providers: list[str]) -> Any:
    if ENV.engine_runner == "fake":
        return FakeEncoder(manifest.dimensions)
    from workers.engine.encoder import OnnxEncoder

    return OnnxEncoder(directory, providers, ENV.engine_threads)


def _meter_batches(name: str) -> Any:
    def on_batch(report: BatchReport) -> None:
        ENGINE_STEP_SECONDS.labels(name).observe(report.seconds)
        ENGINE_WAITING.labels(name).set(report.waiting)
        ENGINE_TOKENS.labels(name, "prompt").inc(report.tokens)
        ENCODER_BATCH_TEXTS.labels(name).observe(report.texts)

    return on_batch


__all__ = ["Serving", "close_serving", "get_serving", "open_serving"]
