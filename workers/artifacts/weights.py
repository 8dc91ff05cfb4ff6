"""Keep a model's large constants in one file beside its graphs, so that several graphs share them and none is bounded by protobuf.

ONNX calls this external data: a graph's tensor names a file, an offset and a length. ONNX Runtime maps the file, so that the sessions
of one model, and the worker processes of one machine, hold one copy.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

WEIGHTS_FILE = "weights.bin"
SMALL_BYTES = 1024
"""Constants below this stay in the graph: shapes and axes, which the optimizer wants to read."""
_PAGE_BYTES = 4096


class WeightFile:
    """Write constants one after the other, each once. Use it with ``with``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def move(self, tensor: Any) -> None:
        """Move a TensorProto's bytes into the file and leave the place where they lie. An equal name means equal bytes.

        I/O: appends to the file.
        """
        data = tensor.raw_data
        if len(data) < SMALL_BYTES:
            return
        if tensor.name not in self._places:
            # a page's boundary: what begins there can be mapped instead of read
            self._file.write(bytes(-self._file.tell() % _PAGE_BYTES))
            self._places[tensor.name] = self._file.tell(), len(data)
            self._file.write(data)
        offset, length = self._places[tensor.name]
        assert length == len(data), f"two constants are called {tensor.name}"
        tensor.ClearField("raw_data")
        tensor.data_location = tensor.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
