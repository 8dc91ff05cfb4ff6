"""Open ONNX Runtime sessions the way aiscale wants them."""

from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

_ERRORS_ONLY = 3

IDENTITY_GRAPH = bytes.fromhex(
    "08083a500a1a0a06736f75726365120674617267657422084964656e746974791204636f70795a150a06736f75726365120b0a09080212050a03"
    "12016e62150a06746172676574120b0a09080212050a0312016e42040a001011"
)
"""An ONNX model of one `Identity` node, ``source`` uint8 ``[n]`` to ``target``: ONNX Runtime's way to copy bytes on a device. Written
out since the engine does without the `onnx` package; a test builds it anew and compares."""


def open_session(graph: Path | bytes, providers: Sequence[str], threads: int) -> ort.InferenceSession:
    """Load a graph. ``threads`` 0 leaves their number to ONNX Runtime.

    I/O: reads the graph. Raises: FileNotFoundError; whatever ONNX Runtime says of a graph that it cannot run.
    """
    if isinstance(graph, Path) and not graph.is_file():
        raise FileNotFoundError(f"there is no model graph {graph}; run `python -m workers.artifacts ensure`")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    # Threads spin for work between the nodes of one run, but not between runs: other processes want the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    source = str(graph) if isinstance(graph, Path) else graph
    return ort.InferenceSession(source, options, providers=list(providers))
