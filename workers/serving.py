"""Hold everything that one worker process serves: a thread for each model, and the jobs in hand."""

import logging
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from aiscale.observability import ENCODER_BATCH_TEXTS, ENGINE_STEP_SECONDS, ENGINE_TOKENS, ENGINE_WAITING
from aiscale.wire import scopes
from aiscale.wire.jobs import EncodeJob, GenerateJob
from aiscale.wire.manifest import TOKENIZER_FILE, Manifest
from workers.config import ENV
from workers.engine.encoding import BatchReport, EncoderThread, EncodeTask
from workers.engine.engine import Engine
from workers.engine.runner_fake import FakeClassifier, FakeEncoder
from workers.engine.vocabulary import Vocabulary
from workers.generation import Generation
from workers.generators import forget_gauges, open_engine
from workers.lanes import Lanes
from workers.publish import JobInHand, Publisher
from workers.versions import list_wanted

log = logging.getLogger(__name__)

ENCODER_LANES = 3
"""One batch is computed while the next one is fetched, and a large job does not keep all others out."""

RELOAD_AFTER_S = 60.0
"""How long a version that could not be loaded is left alone."""

_serving: "Serving | None" = None
_ready = threading.Event()


@dataclass(frozen=True)
class Served:
    """Hold what computes one version of a model."""

    thread: Engine | EncoderThread
    vocabulary: Vocabulary | None


class Serving:
    """Serve the models of this worker, some in several versions. Methods may be called from any thread, `refresh` from one."""

    def __init__(self, traffic: dict[str, list[str]] | None = None) -> None:
        """``traffic`` names the versions of each model that requests are sent to. I/O: loads every model."""
        self.publisher = Publisher()
        self.jobs: dict[str, JobInHand] = {}
        self.versions: dict[str, list[str]] = {}
        """What is served, by model; the version that most requests are for comes first."""
        self.providers: list[str] = _choose_providers()
        self.started_at_ms = time.time_ns() // 1_000_000
        self.closing = False
        self.draining = False
        """Whether the worker was told to stop: it takes no more jobs."""
        self.lanes: dict[str, Lanes] = {}
        self.orders: dict[str, scopes.Order] = {}
        """What is stopped, by scope, as this worker has heard it."""
        self._served: dict[tuple[str, str], Served] = {}
        self._unwanted_since: dict[tuple[str, str], float] = {}
        self._failed_at: dict[tuple[str, str], float] = {}
        for directory, manifest in list_wanted(traffic or {}).values():
            self._load(directory, manifest)

    def submit(self, in_hand: JobInHand) -> bool:
        """Start a claimed job. Whatever cannot be started ends as an error; False when its thread is gone, and others should try it."""
        job = in_hand.job
        self.take(in_hand)
        try:
            served = self._find(job)
            if served is None:
                # its traffic was to come only when every worker had it: this one lost it, or is about to get it
                missing = f"this worker does not serve {job.model} {job.model_version}"
                self.publisher.finish(in_hand, "error", error=missing, code="worker_lost")
            elif isinstance(job, GenerateJob):
                self.publisher.start_job(in_hand)
                self._submit_generation(served, in_hand, job)
            else:
                assert isinstance(served.thread, EncoderThread)
                served.thread.submit(self._make_encode_task(in_hand, job))
        except ValueError as error:
            self.publisher.finish(in_hand, "error", error=str(error))
        except RuntimeError as error:
            log.warning("a job came too late: %s", error, extra={"job_id": job.job_id})
            self.publisher.drop(in_hand)
            # the process is about to end: it must not go through all that waits meanwhile
            self.draining = self.draining or self.find_dead() is not None
            return False
        return True

    def take(self, in_hand: JobInHand) -> None:
        self.jobs[in_hand.job.job_id] = in_hand

    def forget(self, job_id: str) -> None:
        self.jobs.pop(job_id, None)

    def abort(self, job_id: str, reason: Any, message: str | None = None) -> None:
        """End a job at its engine's next step, if it is here."""
        in_hand = self.jobs.get(job_id)
        served = None if in_hand is None else self._find(in_hand.job)
        if served is None:
            return
        if isinstance(served.thread, Engine):
            served.thread.abort(job_id, reason, message)
        else:
            served.thread.abort(job_id, f"{reason}: {message or ''}")

    def find_order(self, job: GenerateJob | EncodeJob) -> scopes.Order | None:
        """Return the order that stops a job, if there is one. I/O: none."""
        covering = scopes.list_scopes(job) + [f"provider:{name}" for name in self.providers]
        return scopes.find_order(self.orders, covering, time.time_ns() // 1_000_000)

    def counts(self) -> tuple[int, int]:
        """Return (running, waiting) over all models."""
        both = [served.thread.counts() for served in list(self._served.values())]
        return sum(pair[0] for pair in both), sum(pair[1] for pair in both)

    def find_dead(self) -> str | None:
        """Name a model whose thread is gone."""
        gone = (key for key, served in self._served.items() if not served.thread.is_alive)
        # one that was let go of just now is not dead
        return next((key[0] for key in gone if key in self._served), None)

    def refresh(self, traffic: dict[str, list[str]]) -> list[str]:
        """Load the versions that requests are to be sent to, and let go of those that have had none for as long as one may live.

        Returns the models that are new here. I/O: reads the models directory, loads models. One thread calls it.
        """
        wanted, known = list_wanted(traffic), set(self.versions)
        for key, (directory, manifest) in wanted.items():
            if key in self._served or time.monotonic() - self._failed_at.get(key, -RELOAD_AFTER_S) < RELOAD_AFTER_S:
                continue
            try:
                self._load(directory, manifest)
            except Exception:
                log.exception("version %s cannot be loaded", manifest.version, extra={"model": manifest.name})
                self._failed_at[key] = time.monotonic()
        for key in list(self._served):
            others = any(other[0] == key[0] and other in wanted for other in self._served)
            if key in wanted or not others:
                self._unwanted_since.pop(key, None)
            elif time.monotonic() - self._unwanted_since.setdefault(key, time.monotonic()) > ENV.request_deadline_s:
                self._unload(key)
        for name, versions in self.versions.items():
            versions.sort(
                key=lambda version: traffic[name].index(version) if version in traffic.get(name, ()) else len(versions)
            )
        return [name for name in self.versions if name not in known]

    def _find(self, job: GenerateJob | EncodeJob) -> Served | None:
        return self._served.get((job.model, job.model_version))

    def close(self) -> None:
        """Stop all threads; jobs that still run end as errors, those that said nothing yet are left to the reaper."""
        self.closing = self.draining = True
        for served in list(self._served.values()):
            served.thread.stop()
        self.publisher.flush(5.0)

    def _load(self, directory: Path, manifest: Manifest) -> None:
        started, name = time.monotonic(), manifest.name
        if manifest.kind == "generate":
            tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
            vocabulary = Vocabulary(tokenizer, manifest.vocab_size, manifest.eos_token_ids)
            served = Served(open_engine(directory, manifest, self.providers), vocabulary)
            lanes = Lanes("generate", ENV.engine_slots)
        else:
            encoder = EncoderThread(
                _open_encoder(directory, manifest, self.providers),
                max_batch=ENV.encoder_batch,
                # characters are cheap: a classifier's batches are bounded by their number alone
                max_batch_tokens=ENV.encoder_batch_tokens if manifest.reads == "tokens" else sys.maxsize,
                max_wait_s=ENV.encoder_wait_ms / 1000,
                on_batch=_meter_batches(name, manifest.version),
            )
            served, lanes = Served(encoder, None), Lanes("encode", ENCODER_LANES)
        served.thread.start(f"{manifest.kind}-{name}-{manifest.version}")
        self._served = {**self._served, (name, manifest.version): served}
        self.lanes.setdefault(name, lanes)
        self.versions = {**self.versions, name: [*self.versions.get(name, []), manifest.version]}
        log.info("loaded in %.1f s", time.monotonic() - started, extra={"model": name, "event": "model.loaded"})

    def _unload(self, key: tuple[str, str]) -> None:
        name, version = key
        served = self._served[key]
        if served.thread.counts() != (0, 0):
            return
        self._served = {other: kept for other, kept in self._served.items() if other != key}
        self.versions = {**self.versions, name: [kept for kept in self.versions[name] if kept != version]}
        self._unwanted_since.pop(key, None)
        served.thread.stop()
        if isinstance(served.thread, Engine):
            served.thread.runner.close()
        forget_gauges(name, version)
        log.info("let go of version %s", version, extra={"model": name, "event": "model.unloaded"})

    def _submit_generation(self, served: Served, in_hand: JobInHand, job: GenerateJob) -> None:
        engine, vocabulary = served.thread, served.vocabulary
        assert isinstance(engine, Engine)
        assert vocabulary is not None  # generators have one
        generation = Generation(in_hand, job, vocabulary, self.publisher, engine.abort, lambda: self.closing)
        engine.submit(generation.make_sequence())

    def _make_encode_task(self, in_hand: JobInHand, job: EncodeJob) -> EncodeTask:
        def on_done(vectors: Any, error: str | None) -> None:
            if vectors is not None:
                in_hand.prompt_tokens = sum(len(text) for text in job.inputs) + job.cached_tokens
                in_hand.cached_tokens = job.cached_tokens
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
    from workers.control import read_traffic_at_start, start_control

    global _serving
    if _serving is None:
        _serving = Serving(read_traffic_at_start())
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
        return FakeClassifier(manifest.labels) if manifest.kind == "classify" else FakeEncoder(manifest.dimensions)
    if manifest.reads == "characters":
        from workers.engine.moderation import ModerationEncoder

        return ModerationEncoder(directory, providers, ENV.engine_threads)
    from workers.engine.encoder import OnnxEncoder

    return OnnxEncoder(directory, providers, ENV.engine_threads)


def _meter_batches(name: str, version: str) -> Any:
    def on_batch(report: BatchReport) -> None:
        ENGINE_STEP_SECONDS.labels(name).observe(report.seconds)
        ENGINE_WAITING.labels(name, version).set(report.waiting)
        ENGINE_TOKENS.labels(name, "prompt").inc(report.tokens)
        ENCODER_BATCH_TEXTS.labels(name).observe(report.texts)

    return on_batch


__all__ = ["Serving", "close_serving", "get_serving", "open_serving"]
