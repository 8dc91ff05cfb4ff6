"""Hold the keys and values of all sequences: in each layer, one row of fixed capacity for each slot.

On the CPU a row costs memory only as far as it has been written: its pages are mapped by the first write, and `clear` gives
them back. So sixteen slots of 4,096 tokens start at nothing. An accelerator's memory is taken at once.
"""

import mmap
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

_CAPACITY_STEP_TOKENS = 64
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


@dataclass(frozen=True)
class KvShape:
    """State the shape of every tensor: ``[rows, kv_heads, capacity, head_dim]``; ``tensors`` counts keys and values apart."""

    tensors: int
    rows: int
    kv_heads: int
    capacity: int
    head_dim: int
    dtype: np.dtype[Any]

    @property
    def head_bytes(self) -> int:
        return self.capacity * self.head_dim * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.kv_heads * self.head_bytes

    def batch(self, rows: int) -> list[int]:
        """Return the tensor shape of ``rows`` neighbouring rows."""
        return [rows, self.kv_heads, self.capacity, self.head_dim]


class KvBuffers(Protocol):
    """Own the memory of all rows. Rows of one tensor lie next to each other, so any run of rows is one batch."""

    device: str
    shape: KvShape

    def address(self, tensor: int, row: int) -> int:
        """Return the address at which ``row`` starts."""
        ...

    def move(self, source: int, target: int, tokens: int, start: int = 0) -> None:
        """Copy positions ``start`` to ``tokens`` of one row over another's, in every tensor."""
        ...

    def clear(self, row: int) -> None:
        """Forget a row's content."""
        ...

    def close(self) -> None: ...


def round_capacity(tokens: int) -> int:
    """Round up to what keeps the rows of usual head sizes on pages of their own."""
    return -(-tokens // _CAPACITY_STEP_TOKENS) * _CAPACITY_STEP_TOKENS


class HostBuffers:
    """Keep rows in this process's memory, mapped lazily. Raises: MemoryError where the system promises only what it has."""

    device = "cpu"

    def __init__(self, shape: KvShape) -> None:
        self.shape = shape
        try:
            self._maps = [mmap.mmap(-1, shape.rows * shape.row_bytes, **_PRIVATE) for _ in range(shape.tensors)]
        except OSError as error:
            size_bytes = shape.tensors * shape.rows * shape.row_bytes
            raise MemoryError(
                f"the system grants no {size_bytes / 1e9:.1f} GB of address space for keys and values ({error.strerror}); "
                "set fewer AISCALE_ENGINE_SLOTS or AISCALE_CONTEXT_TOKENS"
            ) from error
        self._arrays: list[NDArray[Any]] = [
            np.frombuffer(memory, dtype=shape.dtype).reshape(shape.batch(shape.rows)) for memory in self._maps
        ]
        self._addresses = [array.ctypes.data for array in self._arrays]
        self._on_pages = hasattr(mmap, "MADV_DONTNEED") and shape.row_bytes % mmap.PAGESIZE == 0

    def address(self, tensor: int, row: int) -> int:
        return self._addresses[tensor] + row * self.shape.row_bytes

    def move(self, source: int, target: int, tokens: int, start: int = 0) -> None:
        for array in self._arrays:
            array[target, :, start:tokens] = array[source, :, start:tokens]

    def clear(self, row: int) -> None:
        """Zero the row and give its memory back to the system."""
        if not self._on_pages:
            for array in self._arrays:
                array[row] = 0
            return
        for memory in self._maps:
            memory.madvise(mmap.MADV_DONTNEED, row * self.shape.row_bytes, self.shape.row_bytes)

    def close(self) -> None:
        self._arrays.clear()
        self._maps.clear()


class DeviceBuffers:
    """Keep rows in an accelerator's memory, taken at once; copies never leave the device.

    ``copier`` is a session of `IDENTITY_GRAPH` on the same device: the one way to copy between two addresses there that ONNX
    Runtime offers.
    """

    def __init__(self, shape: KvShape, device: str, copier: ort.InferenceSession) -> None:
        self.shape = shape
        self.device = device
        self._copier = copier
        self._values = [
            ort.OrtValue.ortvalue_from_shape_and_type(shape.batch(shape.rows), shape.dtype.type, device, 0)
            for _ in range(shape.tensors)
        ]
        self._addresses = [int(value.data_ptr()) for value in self._values]

    def address(self, tensor: int, row: int) -> int:
        return self._addresses[tensor] + row * self.shape.row_bytes

    def move(self, source: int, target: int, tokens: int, start: int = 0) -> None:
        token_bytes = self.shape.head_dim * self.shape.dtype.itemsize
        extent = [(tokens - start) * token_bytes]
        for tensor in range(self.shape.tensors):
            for head in range(self.shape.kv_heads):
                offset = head * self.shape.head_bytes + start * token_bytes
                binding = self._copier.io_binding()
                ends = self.address(tensor, source) + offset, self.address(tensor, target) + offset
                binding.bind_input("source", self.device, 0, np.uint8, extent, ends[0])
                binding.bind_output("target", self.device, 0, np.uint8, extent, ends[1])
                self._copier.run_with_iobinding(binding)

    def clear(self, row: int) -> None:
        """Nothing to do: no step reads past a row's length, and the memory stays ours."""

    def close(self) -> None:
        self._values.clear()
