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
from onnx import TensorProto, helper

from tests.workers.test_engine import Asked, submit
from tests.workers.tiny import TinyLlama
from workers import serving
from workers.artifacts import gguf_decoder
from workers.artifacts.integer import needs_unsigned
from workers.engine import runner_onnx, sessions
from workers.engine.engine import Engine
from workers.engine.kv_buffers import DeviceBuffers, HostBuffers, KvShape
from workers.engine.providers import CPU, CUDA
from workers.engine.runner import Chunk
from workers.engine.runner_onnx import OnnxRunner

PROMPT = [5, 9, 14, 3, 30, 31, 8, 22]


def make(folder: Path, precision: Any) -> Path:
    folder.mkdir()
    shape = gguf_decoder.convert(TinyLlama().write_gguf(folder / "t.gguf"), folder / "model.onnx", precision)
    facts = {"context_tokens": shape.context_tokens, "vocab_size": shape.vocab_size, "precision": precision}
    facts["unsigned_weights"] = needs_unsigned()
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


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, opened: list[list[str]], devices: list[str]) -> None:
    """Have sessions say that they took CUDA, and lay what is bound to it into the CPU's memory; note what was opened."""

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


def test_keys_and_values_stay_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA in force the runner binds device memory for every key and value, and copies with the device's own session."""
    folder = make(tmp_path / "fp16", "fp16")
    plain = run_all(open_runner(folder, [CPU]))
    opened: list[list[str]] = []
    devices: list[str] = []
    pretend_cuda(monkeypatch, opened, devices)
    runner = open_runner(folder, [CUDA, CPU])
    assert isinstance(runner._kv, DeviceBuffers) and runner._kv.shape.dtype == np.float16
    assert opened == [[CUDA, CPU]] * 3 and devices == ["cuda"], "the model, what copies, what picks"
    for found, expected in zip(run_all(runner), plain, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_tokens_alone_leave_the_device_in_greedy_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of greedy sequences is decoded where its logits are, to the same tokens; as soon as one draws, the logits come over."""
    devices: list[str] = []
    pretend_cuda(monkeypatch, [], devices)
    runner = open_runner(make(tmp_path / "fp16", "fp16"), [CUDA, CPU])
    assert runner.picks and devices == ["cuda"]
    came_over, stayed = count_calls(monkeypatch, runner, "_run"), count_calls(monkeypatch, runner, "_run_there")

    def run(**changes: Any) -> list[list[int]]:
        engine, asked = Engine(runner, ()), [Asked(f"j{n}", [5 + n, 9, 14], max_tokens=12) for n in range(2)]
        asked.append(Asked("last", [7, 9, 14], max_tokens=12, **changes))
        submit(engine, *asked)
        while not all(each.sequence.ended for each in asked):
            engine.step()
        return [each.sequence.tokens for each in asked]

    picked = run()
    assert (len(came_over), len(stayed)) == (1, 11), "the prompts' last positions, and no step after them"
    monkeypatch.setattr(OnnxRunner, "picks", False)
    assert run() == picked and len(stayed) == 11
    monkeypatch.setattr(OnnxRunner, "picks", True)
    assert run(temperature=1.0, seed=3)[:2] == picked[:2] and len(stayed) == 11
    assert run(top_logprobs=0) == picked and len(stayed) == 11


def count_calls(monkeypatch: pytest.MonkeyPatch, runner: OnnxRunner, name: str) -> list[int]:
    calls: list[int] = []
    method = getattr(runner, name)

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return method(*arguments)

    monkeypatch.setattr(runner, name, counted)
    return calls


def test_the_picking_graph_is_what_it_says() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("ArgMax", ["logits"], ["tokens"], axis=1, keepdims=0),
            helper.make_node("ReduceMax", ["logits"], ["peaks"], axes=[1], keepdims=0),
        ],
        "pick",
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", "v"])],
        [
            helper.make_tensor_value_info("tokens", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("peaks", TensorProto.FLOAT, ["n"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.producer_name = ""
    assert model.SerializeToString() == sessions.PICK_GRAPH
    rows = np.array([[1, 5, 5], [-2, -3, -9]], np.float32)
    tokens, peaks = sessions.open_session(sessions.PICK_GRAPH, [CPU], 1).run(None, {"logits": rows})
    assert tokens.tolist() == [1, 0] and peaks.tolist() == [5, -2], "the first of equals, as on the CPU"


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
