"""Measure what the machine can do at the most, to hold other figures against: products of matrices, and copies of memory."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from workers.artifacts.integer import needs_unsigned

SIDE = 1024
COPIED_BYTES = 128 << 20
TRIES = 6
"""Of each the best counts: what others take of the machine is not the machine's limit."""


@dataclass(frozen=True)
class Peaks:
    """Hold the most that was reached with all cores."""

    float_gflops: float
    """ONNX Runtime's product of two float32 matrices of 1,024 by 1,024."""
    integer_gops: float
    """The same of bytes, as models' weights are kept for this CPU: signed, or unsigned where signed ones would overflow."""
    read_gb: float
    """A second, as a copy reads it (it writes as much again)."""

    def describe(self) -> str:
        return (
            f"this machine, {os.cpu_count()} cores: {self.float_gflops:.0f} GFLOP/s in fp32 products, {self.integer_gops:.0f} GOP/s "
            f"in int8 products, {self.read_gb:.1f} GB/s read by copies"
        )


def measure_peaks() -> Peaks:
    """I/O: a second or two of all cores."""
    floats = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    codes = np.ones((SIDE, SIDE), np.uint8), np.ones((SIDE, SIDE), np.uint8 if needs_unsigned() else np.int8)
    return Peaks(
        float_gflops=_time_product("MatMul", floats, floats),
        integer_gops=_time_product("MatMulInteger", *codes),
        read_gb=_time_copies(),
    )


def _time_product(kind: str, left: np.ndarray, right: np.ndarray) -> float:
    types = {np.float32: TensorProto.FLOAT, np.uint8: TensorProto.UINT8, np.int8: TensorProto.INT8}
    out = TensorProto.FLOAT if kind == "MatMul" else TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(kind, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", types[left.dtype.type], left.shape)],
        [helper.make_tensor_value_info("c", out, [SIDE, SIDE])],
        # a constant, as weights are: kernels lay it out beforehand
        [onnx.numpy_helper.from_array(right, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return 2 * SIDE**3 / 1e9 / _best(lambda: session.run(None, {"a": left}))


def _time_copies() -> float:
    cores = os.cpu_count() or 1
    pairs = [(np.ones(COPIED_BYTES, np.uint8), np.empty(COPIED_BYTES, np.uint8)) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        took_s = _best(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs)))
    return cores * COPIED_BYTES / 1e9 / took_s


def _best(work) -> float:
    took = []
    for _ in range(TRIES):
        started = time.perf_counter()
        work()
        took.append(time.perf_counter() - started)
    return min(took)


def count_bert_flops(config: dict, tokens: int) -> float:
    """Return the operations that a text of so many tokens takes in fp32: products and attention."""
    hidden, ffn, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    return tokens * layers * 2.0 * (4 * hidden * hidden + 2 * hidden * ffn + 2 * tokens * hidden)


if __name__ == "__main__":
    print(measure_peaks().describe())
