"""Open ONNX Runtime sessions the way aiscale wants them."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

_ERRORS_ONLY = 3

IDENTITY_GRAPH = bytes.fromhex(
    "08083a500a1a0a06736f75726365120674617267657422084964656e746974791204636f70795a150a06736f75726365120b0a09080212050a03"
    "12016e62150a06746172676574120b0a09080212050a0312016e42040a001011"
)
"""An ONNX model of one `Identity` node, ``source`` uint8 ``[n]`` to ``target``: ONNX Runtime's way to copy bytes on a device. Written
out since the engine does without the `onnx` package; a test builds it anew and compares."""

PICK_GRAPH = bytes.fromhex(
    "080812003ac1010a360a066c6f676974731206746f6b656e7322064172674d61782a0b0a04617869731801a001022a0f0a086b65657064696d73"
    "1800a001020a380a066c6f6769747312057065616b7322095265647563654d61782a0b0a04617865734001a001072a0f0a086b65657064696d73"
    "1800a0010212047069636b5a1a0a066c6f6769747312100a0e0801120a0a0312016e0a0312017662150a06746f6b656e73120b0a09080712050a"
    "0312016e62140a057065616b73120b0a09080112050a0312016e42040a001011"
)
"""An ONNX model that takes ``logits`` float32 ``[n, vocab]`` and gives the likeliest ``tokens`` int64 ``[n]``, the first of equals, and
their ``peaks`` float32 ``[n]``: what a greedy step needs of an accelerator's logits."""

INTEGER_GRAPH = bytes.fromhex(
    "08083a7c0a250a046c6566740a057269676874120770726f64756374220d4d61744d756c496e746567657212016d5a180a046c65667412100a0e"
    "0802120a0a0312016d0a0312016b5a190a05726967687412100a0e0803120a0a0312016b0a0312016e621b0a0770726f6475637412100a0e0806"
    "120a0a0312016d0a0312016e42040a001010"
)
"""An ONNX model of one `MatMulInteger` node, ``left`` uint8 ``[m, k]``, ``right`` int8 ``[k, n]``."""


def open_session(
    graph: Path | bytes, providers: Sequence[str], threads: int, optimize: Literal["all", "basic"] = "all"
) -> ort.InferenceSession:
    """Load a graph. ``threads`` 0 leaves their number to ONNX Runtime; ``basic`` keeps it from fusing operators.

    I/O: reads the graph. Raises: FileNotFoundError; whatever ONNX Runtime says of a graph that it cannot run.
    """
    if isinstance(graph, Path) and not graph.is_file():
        raise FileNotFoundError(f"there is no model graph {graph}; run `python -m workers.artifacts ensure`")
    if "CUDAExecutionProvider" not in providers:
        # measured: plain attention is twice as fast on the CPU, and what it makes of a token does not depend on the chunk
        os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    if optimize == "basic":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # Threads spin for work between the nodes of one run, but not between runs: other processes want the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    source = str(graph) if isinstance(graph, Path) else graph
    return ort.InferenceSession(source, options, providers=list(providers))


@functools.cache
def integers_add_up() -> bool:
    """Say whether this CPU multiplies unsigned by signed bytes exactly.

    AVX2 without VNNI adds pairs of products in sixteen bits, and cuts what does not fit. I/O: one tiny session.
    """
    session = open_session(INTEGER_GRAPH, ["CPUExecutionProvider"], 1)
    left, right = np.full((4, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    [product] = session.run(None, {"left": left, "right": right})
    return bool((product == 255 * 127 * 64).all())


def refuse_overflow(model_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ValueError for a model whose signed bytes this CPU would add up wrongly."""
    if manifest["precision"] == "int8" and not manifest.get("unsigned_weights") and not integers_add_up():
        raise ValueError(
            f"{model_dir.name} of {manifest['name']} was converted for CPUs with int8 units, and its sums would overflow on this one; "
            "convert it here: `python -m workers.artifacts ensure` for a bundled model, `manage.py import_model` for others"
        )
