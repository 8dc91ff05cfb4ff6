"""Files that lie about their counts, places and types are refused at once, whatever they claim."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from aiscale.wire.manifest import list_manifests
from tests.workers.tiny import TinyLlama
from workers.artifacts.errors import ArtifactError, ConversionError
from workers.artifacts.gguf_file import open_file
from workers.artifacts.imports import import_model

UINT8, BOOL, STRING, ARRAY, INT64, FLOAT64 = 0, 7, 8, 9, 11, 12


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def field(name: str, kind: int, raw: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + raw


def tensor(name: str, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def whole(fields: list[bytes], tensors: list[bytes] | None = None, data: bytes = bytes(256)) -> bytes:
    stated = tensors or []
    head = b"GGUF" + struct.pack("<IQQ", 3, len(stated), len(fields)) + b"".join(fields) + b"".join(stated)
    return head + bytes(-len(head) % 32) + data


def nested(depth: int) -> bytes:
    return field("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQB", UINT8, 1, 7))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "not a whole GGUF"),
    "a head alone": (b"GGUF" + struct.pack("<I", 3), "not a whole GGUF"),
    "another byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "an old version": (b"GGUF" + struct.pack("<III", 1, 0, 0), "version 1"),
    "2^63 fields": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 63) + bytes(99), "claims 9223372036854775808 fields"),
    "2^60 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(99), "claims 1152921504606846976 tensors"),
    "an array of 2^40 bytes": (whole([field("a", ARRAY, struct.pack("<IQ", UINT8, 1 << 40))]), "claims 1099511627776"),
    "an array of 2^61 strings": (whole([field("a", ARRAY, struct.pack("<IQ", STRING, 1 << 61))]), "strings with"),
    "an array of nothing known": (whole([field("a", ARRAY, struct.pack("<IQ", 77, 1))]), "77"),
    "arrays in arrays": (whole([nested(50_000)]), "arrays of arrays"),
    "a string of 2^64 - 1 bytes": (whole([field("a", STRING, struct.pack("<Q", (1 << 64) - 1))]), "characters with"),
    "a string that is none": (whole([field("a", STRING, text(b"\xff\xfe"))]), "utf-8"),
    "a value of nothing known": (whole([field("a", 99, bytes(8))]), "99"),
    "a name twice": (whole([field("a", UINT8, b"\1")] * 2), "states a twice"),
    "an alignment of nothing": (whole([field("general.alignment", 4, bytes(4))]), "alignment is 0"),
    "an alignment in words": (whole([field("general.alignment", STRING, text("wide"))]), "alignment is wide"),
    "a tensor before the file": (whole([], [tensor("t", [8], offset=(1 << 64) - 32)]), "ends after byte"),
    "a tensor behind it": (whole([], [tensor("t", [8], offset=1 << 62)]), "ends after byte"),
    "a tensor beyond its end": (whole([], [tensor("t", [65])]), "ends after byte"),
    "a tensor of nothing": (whole([], [tensor("t", [8, 0])]), "has the shape (0, 8)"),
    "a tensor without sizes": (whole([], [tensor("t", [])]), "has the shape ()"),
    "a tensor of 2^126 values": (whole([], [tensor("t", [1 << 63, 1 << 63])]), "has the shape"),
    "a tensor of 2^31 dimensions": (whole([], [text("t") + struct.pack("<I", 1 << 31)]), "dimensions"),
    "a tensor of an unknown kind": (whole([], [tensor("t", [8], kind=250)]), "250"),
    "half a block": (whole([], [tensor("t", [33], kind=8)]), "in blocks of 32"),
    "a tensor twice": (whole([], [tensor("t", [8])] * 2), "names a tensor twice"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, how: str) -> None:
    data, reason = HOSTILE[how]
    (tmp_path / "h.gguf").write_bytes(data)
    with pytest.raises(ConversionError, match="not a whole GGUF file") as refused:
        open_file(tmp_path / "h.gguf")
    assert reason in str(refused.value), refused.value


def test_it_reads_what_the_package_wrote(tmp_path: Path, tiny_llama: Any) -> None:
    """The `gguf` package's own reader says the same of each field, tensor and value."""
    path = tiny_llama.write_gguf(tmp_path / "t.gguf", gguf.GGMLQuantizationType.Q4_1)
    ours, theirs = open_file(path), gguf.GGUFReader(str(path))
    told = {name: value.contents() for name, value in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.fields == told
    assert [*ours.tensors] == [each.name for each in theirs.tensors]
    for each in theirs.tensors:
        expected = gguf.quants.dequantize(each.data, each.tensor_type)
        np.testing.assert_array_equal(ours.tensors[each.name].dequantize(), expected)


def pack(value: Any) -> tuple[int, bytes]:
    """Return a value's type and bytes."""
    if isinstance(value, list):
        packed = [pack(entry) for entry in value]
        return ARRAY, struct.pack("<IQ", packed[0][0] if packed else UINT8, len(value)) + b"".join(
            raw for _, raw in packed
        )
    if isinstance(value, str):
        return STRING, text(value)
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    return (FLOAT64, struct.pack("<d", value)) if isinstance(value, float) else (INT64, struct.pack("<q", value))


WRONG: tuple[Any, ...] = (-1, 0, 1 << 62, "text", [1, 2], ["a", "b"], [], True, 1e300, float("nan"))


def test_fields_of_wrong_types_end_in_one_line_or_in_a_model(tmp_path: Path) -> None:
    """Each field in turn becomes each of `WRONG`."""
    path, models = tmp_path / "t.gguf", tmp_path / "models"
    said = open_file(TinyLlama(layers=1, hidden=32, heads=2, kv_heads=1, ffn=32).write_gguf(path))
    stated, data = [], b""
    for name, each in said.tensors.items():
        stated.append(tensor(name, list(reversed(each.shape)), int(each.kind), len(data)))
        data += each.data.tobytes() + bytes(-each.data.nbytes % 32)

    def try_import(fields: dict[str, Any]) -> str:
        path.write_bytes(whole([field(key, *pack(value)) for key, value in fields.items()], stated, data))
        before = len(list_manifests(models))
        try:
            import_model(models, path, "tiny", "fp32")
        except ArtifactError as error:
            assert "\n" not in str(error) and len(list_manifests(models)) == before
            return str(error)
        return ""

    assert try_import(said.fields) == ""
    refused = [(name, value) for name in said.fields for value in WRONG if try_import(said.fields | {name: value})]
    assert len(refused) > 100 and ("llama.block_count", -1) in refused and ("tokenizer.ggml.tokens", "text") in refused


def test_the_smallest_whole_file_is_read(tmp_path: Path) -> None:
    data = whole([field("a", ARRAY, struct.pack("<IQ3B", UINT8, 3, 1, 2, 3))], [tensor("t", [2, 2])], bytes(16))
    (tmp_path / "t.gguf").write_bytes(data)
    said = open_file(tmp_path / "t.gguf")
    assert said.fields == {"a": [1, 2, 3]} and said.tensors["t"].shape == (2, 2)
