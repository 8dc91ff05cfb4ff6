"""Read a GGUF file: its metadata, and where its tensors lie.

The `gguf` package has a reader too. It takes a quarter of a minute for a vocabulary of 150,000 tokens, and follows whatever counts a file
states: an array that claims 2^40 entries keeps it busy for good. This one checks each count against the bytes that are there. Of the
package, the tables of block sizes and the arithmetic of blocks are used.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from workers.artifacts.errors import ConversionError

MALFORMED = (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    UnicodeDecodeError,
    AssertionError,
    struct.error,
)
"""What reading raises for bytes that are no GGUF file, or only its first part, or say what cannot be."""
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The types of values, as `struct` writes them."""
_LEAST_FIELD_BYTES, _LEAST_TENSOR_BYTES = 13, 24
_MOST_DIMENSIONS, _MOST_VALUES = 4, 1 << 40
_DEFAULT_ALIGNMENT, _MOST_ALIGNMENT = 32, 1 << 20


@dataclass(frozen=True)
class GgufTensor:
    """Be one tensor as it is stored: ``data`` uint8 ``[..., bytes of a row]``, a view of the mapped file; ``shape`` is that of its
    values."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def dequantize(self) -> NDArray[np.float32]:
        """Return float32 of `shape`. Raises: one of `MALFORMED`."""
        return np.asarray(gguf.quants.dequantize(self.data, self.kind), np.float32).reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """Hold what a file says. Arrays of ``fields`` are lists."""

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def read(self, name: str, default: Any = None) -> Any:
        """Return a metadata value. Raises: ConversionError when it is missing and there is no default."""
        value = self.fields.get(name, default)
        if value is None:
            raise ConversionError(f"the GGUF file has no {name}; it is damaged or of another kind")
        return value


def open_file(source: Path) -> GgufFile:
    """Read the metadata, and find the tensors. I/O: maps the file. Raises: ConversionError."""
    try:
        with source.open("rb") as file:
            return _Reader(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).read()
    except MALFORMED as error:
        raise ConversionError(
            f"{source.name} is not a whole GGUF file ({first_line(error)}); download it again"
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class _Reader:
    """Go through a file from its beginning. Raises: one of `MALFORMED`."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def read(self) -> GgufFile:
        magic, version = self._take("4sI")
        if magic != _MAGIC or version not in _VERSIONS:
            raise ValueError(f"it begins with {magic!r}, version {version}; versions 2 and 3 are read, little-endian")
        tensors, count = self._take("QQ")
        self._check_count(count, _LEAST_FIELD_BYTES, "fields")
        self._check_count(tensors, _LEAST_TENSOR_BYTES, "tensors")
        fields: dict[str, Any] = {}
        for _ in range(count):
            name = self._take_string()
            if name in fields:
                raise ValueError(f"it states {name[:80]} twice")
            [kind] = self._take("I")
            fields[name] = self._take_value(kind)
        stated = [self._take_tensor() for _ in range(tensors)]
        alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= _MOST_ALIGNMENT:
            raise ValueError(f"its alignment is {str(alignment)[:40]}")
        start = -(-self._at // alignment) * alignment
        found = {name: self._locate(start, name, *rest) for name, *rest in stated}
        if len(found) != len(stated):
            raise ValueError("it names a tensor twice")
        return GgufFile(fields, found)

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return values

    def _take_string(self) -> str:
        [size] = self._take("Q")
        self._check_count(size, 1, "characters")
        text = self._data[self._at : self._at + size].decode()
        self._at += size
        return text

    def _take_value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._take_string()
        if kind == _ARRAY:
            return self._take_array()
        [value] = self._take(_SCALARS[kind])
        return value

    def _take_array(self) -> list[Any]:
        kind, count = self._take("IQ")
        if kind == _ARRAY:
            raise ValueError("it holds arrays of arrays, which no model that is read here has")
        if kind == _STRING:
            self._check_count(count, 8, "strings")
            return [self._take_string() for _ in range(count)]
        form = _SCALARS[kind]
        self._check_count(count, struct.calcsize(f"<{form}"), "values")
        return list(self._take(f"{count}{form}"))

    def _take_tensor(self) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        name = self._take_string()
        [count] = self._take("I")
        if count > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name[:80]} has {count} dimensions")
        sizes = self._take(f"{count}Q")
        kind, offset = self._take("IQ")
        # the file states the innermost size first
        return name, tuple(reversed(sizes)), gguf.GGMLQuantizationType(kind), offset

    def _locate(
        self, start: int, name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, offset: int
    ) -> GgufTensor:
        """Return a view of a tensor's bytes, which must lie in the file."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        values = 1
        for size in shape:
            values *= size
        if not shape or not 0 < values <= _MOST_VALUES or shape[-1] % block:
            raise ValueError(f"tensor {name[:80]} has the shape {shape} in blocks of {block}")
        size_bytes = values // block * block_bytes
        if start + offset + size_bytes > len(self._data):
            raise ValueError(f"tensor {name[:80]} ends after byte {len(self._data)}, where the file does")
        raw = np.frombuffer(self._data, np.uint8, size_bytes, start + offset)
        return GgufTensor(name, kind, shape, raw.reshape(*shape[:-1], shape[-1] // block * block_bytes))

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > len(self._data) - self._at:
            raise ValueError(f"it claims {count} {what} with {len(self._data) - self._at} bytes left")
