"""Where models run, on machines that have, had, or claim to have an accelerator.

No GPU is needed: what CUDA would do is done under its name by the CPU.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from tests.workers.tiny import TinyLlama
from workers import serving
from workers.artifacts import gguf_decoder
from workers.engine import runner_onnx, sessions
from workers.engine.kv_buffers import DeviceBuffers, HostBuffers, KvShape
from workers.engine.providers import CPU, CUDA
from workers.engine.runner import Chunk
from workers.engine.runner_onnx import OnnxRunner

PROMPT = [5, 9, 14, 3, 30, 31, 8, 22]


def make(folder: Path, precision: Any) -> Path:
    folder.mkdir()
    shape = gguf_decoder.convert(TinyLlama().write_gguf(folder / "t.gguf"), folder / "model.onnx", precision)
    facts = {"context_tokens": shape.context_tokens, "vocab_size": shape.vocab_size, "precision": precision}
    (folder / "manifest.json").write_text(json.dumps(facts))
    return folder


def run_all(runner: OnnxRunner) -> list[NDArray[np.float32]]:
    """Prefill, decode two together, fork, keep, restore and go on: every way in which keys and values move."""
    found = [runner.compute([Chunk(0, PROMPT, 0)])[0].copy(), runner.compute([Chunk(2, PROMPT[:5], 0)])[0].copy()]
    found += list(runner.compute([Chunk(0, [7], 8), Chunk(2, [9], 5)]).copy())
    runner.fork(0, 1)
    runner.keep(0, 0, 0, 8)
    runner.release(0)
    runner.restore(0, 0, 6)
    found += list(runner.compute([Chunk(0, [11], 6), Chunk(1, [11], 9), Chunk(2, [4], 6)]).copy())
    runner.close()
    return found


def open_runner(folder: Path, providers: Sequence[str]) -> OnnxRunner:
    return OnnxRunner(folder, slots=3, context_tokens=64, providers=providers, threads=1, kept_places=1)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_other_precisions_stay_on_the_cpu_and_say_what_to_do(
    tmp_path: Path, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(tmp_path / precision, precision)
    with caplog.at_level(logging.WARNING):
        runner = open_runner(folder, [CUDA, CPU])
    assert runner._session.get_providers() == [CPU] and isinstance(runner._kv, HostBuffers)
    assert "ensure --precision fp16" in caplog.text
    runner.close()


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_a_gpu_that_cannot_be_opened_leaves_the_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ONNX Runtime drops what it cannot open; the buffers follow what it really took, not what was asked for."""
    folder = make(tmp_path / "fp16", "fp16")
    with caplog.at_level(logging.WARNING):
        runner = open_runner(folder, [CUDA, CPU])
    assert runner._session.get_providers() == [CPU] and isinstance(runner._kv, HostBuffers)
    assert "the GPU could not be opened" in caplog.text
    for found, expected in zip(run_all(runner), run_all(open_runner(folder, [CPU])), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_keys_and_values_stay_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA in force the runner binds device memory for every key and value, and copies with the device's own session."""
    folder = make(tmp_path / "fp16", "fp16")
    plain = run_all(open_runner(folder, [CPU]))
    opened: list[list[str]] = []
    devices: list[str] = []

    class Pretending(ort.InferenceSession):
        def get_providers(self) -> list[str]:
            return [CUDA, CPU]

    def open_session(graph: Any, providers: Sequence[str], threads: int, optimize: Any = "all") -> Any:
        opened.append(list(providers))
        monkeypatch.setattr(sessions.ort, "InferenceSession", Pretending)
        try:
            return sessions.open_session(graph, [CPU], threads, optimize)
        finally:
            monkeypatch.undo()
            patch()

    class OnCpu(DeviceBuffers):
        def __init__(self, shape: KvShape, device: str, copier: Any) -> None:
            devices.append(device)
            super().__init__(shape, "cpu", copier)

    def patch() -> None:
        monkeypatch.setattr(runner_onnx, "open_session", open_session)
        monkeypatch.setattr(runner_onnx, "DeviceBuffers", OnCpu)

    patch()
    runner = open_runner(folder, [CUDA, CPU])
    assert isinstance(runner._kv, OnCpu) and runner._kv.shape.dtype == np.float16
    assert opened == [[CUDA, CPU], [CUDA, CPU]] and devices == ["cuda"]
    for found, expected in zip(run_all(runner), plain, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("asked", "available", "chosen"),
    [("", [CUDA, CPU], [CUDA, CPU]), ("", [CPU], [CPU]), (CPU, [CUDA, CPU], [CPU]), (CUDA, [CUDA, CPU], [CUDA, CPU])],
)
def test_a_worker_takes_what_is_there(
    monkeypatch: pytest.MonkeyPatch, asked: str, available: list[str], chosen: list[str]
) -> None:
    environment = dataclasses.replace(serving.ENV, engine_runner="onnx", execution_providers=asked)
    monkeypatch.setattr(serving, "ENV", environment)
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    assert serving._choose_providers() == chosen


def test_a_worker_that_is_to_use_a_missing_gpu_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = dataclasses.replace(serving.ENV, engine_runner="onnx", execution_providers=CUDA)
    monkeypatch.setattr(serving, "ENV", environment)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    with pytest.raises(SystemExit, match=r"AISCALE_EXECUTION_PROVIDERS: .* install aiscale\[gpu\]"):
        serving._choose_providers()
