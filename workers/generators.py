"""Open the engine of one generator, within this worker's memory, and measure its steps."""

from collections.abc import Callable
from pathlib import Path

import psutil

from aiscale.observability import (
    ENGINE_BATCH_SIZE,
    ENGINE_FIRST_TOKEN_SECONDS,
    ENGINE_GUESSED_TOKENS,
    ENGINE_KV_TOKENS,
    ENGINE_PREFIX_TOKENS,
    ENGINE_RUNNING,
    ENGINE_STEP_SECONDS,
    ENGINE_TOKEN_GAP_SECONDS,
    ENGINE_TOKENS,
    ENGINE_WAITING,
)
from aiscale.wire.manifest import Manifest
from workers.config import ENV
from workers.engine.engine import Engine
from workers.engine.runner import Runner
from workers.engine.runner_fake import FakeRunner
from workers.engine.step_report import StepReport

KEPT_PLACES = 64
"""How many beginnings of prompts are kept, memory permitting."""
_MEMORY_SHARE = 4
"""Keys and values may fill one part in so many of the machine's memory, unless AISCALE_KV_MEMORY_MB says otherwise."""
_FLOAT_BYTES = 4


def open_engine(directory: Path, manifest: Manifest, providers: list[str]) -> Engine:
    """I/O: loads the model. The engine is not started yet."""
    runner = _open_runner(directory, manifest, providers)
    return Engine(
        runner,
        manifest.eos_token_ids,
        meter(manifest.name, manifest.version),
        kv_tokens=count_kv_tokens(manifest),
        stall_s=ENV.prefill_stall_ms / 1000,
        speculates="by chance" if manifest.batch_invariant else "always",
    )


def count_kv_tokens(manifest: Manifest) -> int:
    """Return how many tokens' keys and values fit into this worker's memory for them."""
    token_bytes = 2 * manifest.layers * manifest.kv_heads * manifest.head_dim * _FLOAT_BYTES
    budget_bytes = ENV.kv_memory_mb << 20 or psutil.virtual_memory().total // _MEMORY_SHARE
    return int(budget_bytes // max(token_bytes, 1))


def _open_runner(directory: Path, manifest: Manifest, providers: list[str]) -> Runner:
    if ENV.engine_runner == "fake":
        return FakeRunner(
            slots=ENV.engine_slots,
            context_tokens=min(ENV.context_tokens, manifest.context_tokens),
            vocab_size=manifest.vocab_size,
            step_s=ENV.fake_step_ms / 1000,
        )
    from workers.engine.runner_onnx import OnnxRunner

    return OnnxRunner(
        directory,
        slots=ENV.engine_slots,
        context_tokens=ENV.context_tokens,
        providers=providers,
        threads=ENV.engine_threads,
        kept_places=KEPT_PLACES,
    )


def meter(name: str, version: str) -> Callable[[StepReport], None]:
    """Return what writes a step's metrics. Versions of a model add up, but for what is now: each has its own (`forget_gauges`)."""

    def on_step(step: StepReport) -> None:
        ENGINE_STEP_SECONDS.labels(name).observe(step.seconds)
        ENGINE_RUNNING.labels(name, version).set(step.running)
        ENGINE_WAITING.labels(name, version).set(step.waiting)
        ENGINE_TOKENS.labels(name, "prompt").inc(step.prefilled)
        ENGINE_TOKENS.labels(name, "completion").inc(len(step.gaps_s) + len(step.first_tokens_s))
        ENGINE_GUESSED_TOKENS.labels(name, "right").inc(step.guessed_right)
        ENGINE_GUESSED_TOKENS.labels(name, "wrong").inc(step.guessed - step.guessed_right)
        ENGINE_PREFIX_TOKENS.labels(name, "asked").inc(step.asked)
        ENGINE_PREFIX_TOKENS.labels(name, "reused").inc(step.reused)
        ENGINE_KV_TOKENS.labels(name, version, "running").set(step.kv_tokens)
        ENGINE_KV_TOKENS.labels(name, version, "kept").set(step.kept_tokens)
        if step.decoded:
            ENGINE_BATCH_SIZE.labels(name).observe(step.decoded)
        for seconds in step.first_tokens_s:
            ENGINE_FIRST_TOKEN_SECONDS.labels(name).observe(seconds)
        for seconds in step.gaps_s:
            ENGINE_TOKEN_GAP_SECONDS.labels(name).observe(seconds)

    return on_step


def forget_gauges(name: str, version: str) -> None:
    """Take away what was said of a version that is here no more."""
    for labels, gauge in (
        ((name, version), ENGINE_RUNNING),
        ((name, version), ENGINE_WAITING),
        ((name, version, "running"), ENGINE_KV_TOKENS),
        ((name, version, "kept"), ENGINE_KV_TOKENS),
    ):
        gauge.labels(*labels)  # removing what was never said is an error
        gauge.remove(*labels)
