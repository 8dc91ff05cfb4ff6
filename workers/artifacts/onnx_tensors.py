"""Read a model's weights out of an ONNX export, by the names that its nodes carry from the model's own code.

Exporters (Optimum, torch, the builder of onnxruntime-genai) turn matrices round and rename them, yet name each node after the module
that it comes from: ``/model/layers.0/self_attn/q_proj/MatMul``. From these the Hugging Face names of safetensors are made, and
aiscale's own graph is built as for a folder of safetensors; the export's graph is never run.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from workers.artifacts.errors import ConversionError

GRAPH_NAMES = ("model.onnx", "onnx/model.onnx", "decoder_model.onnx", "onnx/decoder_model.onnx")
_MOST_VALUES = 1 << 34
_LARGE = 16
"""A float matrix that is at least this large both ways is a weight: left over, it means that the model is another one."""
_FLOATS = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2, TensorProto.DOUBLE: 8}
_BYTES = {TensorProto.UINT8: 1}
_NORMS = ("SimplifiedLayerNormalization", "RMSNormalization", "LayerNormalization", "Mul")
_SKIP_NORMS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
_THROUGH = ("Identity", "Cast")
_PREFIX = re.compile(
    r"(?:^|.*[./])((?:model\.(?:layers|embed_tokens|norm)|lm_head|embeddings|(?:encoder|transformer)\.layer|pooler\.dense|(?:pre_)?classifier)\..+)"
)
_RENAMED = (
    (re.compile(r"\.attn\."), ".self_attn."),
    (re.compile(r"_norm\.layernorm\."), "_norm."),
    (re.compile(r"model\.layers\.\d+\.final_norm_layernorm\."), "model.norm."),
    (re.compile(r"\.(?:MatMul|Add)\.(weight|bias)$"), r".\1"),
)
_TABLES = re.compile(r"cos_cache|sin_cache|inv_freq|position_ids|rotary", re.IGNORECASE)


@dataclass(frozen=True)
class _Place:
    """Say how one weight is read: ``read`` gives it as it is stored, ``turned`` asks for the other way round."""

    tensor: str
    read: Callable[[], NDArray[np.float32]]
    turned: bool = False


def find_graph(folder: Path) -> Path | None:
    """Return the export's graph: the usual names, or the only one there. I/O: lists the folder."""
    for name in GRAPH_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.onnx"))
    return found[0] if len(found) == 1 else None


class OnnxTensors:
    """Give an export's weights by their Hugging Face names."""

    def __init__(self, path: Path) -> None:
        """I/O: reads the graph, not what lies beside it. Raises: ConversionError."""
        self._path = path
        try:
            graph = onnx.load_model(str(path), load_external_data=False).graph
        except Exception as error:  # protobuf's own
            raise ConversionError(f"{path.name} is not a whole ONNX graph; export it again") from error
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and len(node.output) == 1:
                values = [item.t for item in node.attribute if item.name == "value"]
                self._stored |= dict(zip(node.output, values, strict=False))
        self._makers = {output: node for node in graph.node for output in node.output}
        self._places: dict[str, _Place] = {}
        self._used: set[str] = set()
        for name in self._stored:
            ours = _canonical(name)
            if ours is not None and ".MatMul" not in name:
                self._add(ours, name)
        for node in graph.node:
            self._read_node(node)

    def names(self) -> set[str]:
        """Return the names of all weights; one whose part in the model is unknown keeps its own."""
        left = {
            name for name, tensor in self._stored.items() if name not in self._used and self._is_weight(name, tensor)
        }
        return set(self._places) | left

    def read(self, name: str) -> NDArray[np.float32]:
        """Return float32, matrices as ``[out, in]``. I/O: reads the weight. Raises: ConversionError."""
        place = self._places[name]
        value = place.read()
        return np.ascontiguousarray(value.T) if place.turned else value

    def read_all(self) -> dict[str, NDArray[np.float32]]:
        """Read every weight whose part is known. I/O and Raises: as `read`."""
        return {name: self.read(name) for name in sorted(self._places)}

    def list_files(self) -> list[Path]:
        """List the graph and the files that it reads its weights from. Raises: ConversionError."""
        outside = {_location(tensor, self._path) for tensor in self._stored.values() if tensor.external_data}
        return [self._path, *sorted(outside)]

    def _add(self, ours: str, name: str, turned: bool = False) -> None:
        """Note that the constant behind ``name`` is our weight; what is no float constant is left alone."""
        source, flipped = self._follow(name)
        if source is None:
            return
        tensor = self._stored[source]
        if tensor.data_type not in _FLOATS or len(tensor.dims) not in (1, 2):
            return
        self._used.add(source)
        turned = (turned != flipped) and len(tensor.dims) == 2
        self._places.setdefault(ours, _Place(source, lambda: _read(tensor, self._path), turned))

    def _follow(self, name: str) -> tuple[str | None, bool]:
        """Return the constant that a value is, seen through nodes that only turn it or cast it, and whether it is turned."""
        turned = False
        for _ in range(8):
            if name in self._stored:
                return name, turned
            maker = self._makers.get(name)
            if maker is None or not maker.input or maker.op_type not in (*_THROUGH, "Transpose"):
                break
            turned ^= maker.op_type == "Transpose"
            name = maker.input[0]
        return None, False

    def _read_node(self, node: Any) -> None:
        path, _, _ = node.name.strip("/").rpartition("/")
        weight, bias = (_canonical(f"{path.replace('/', '.')}.{kind}") for kind in ("weight", "bias"))
        if weight is None or bias is None:
            return
        if node.op_type == "MatMul" and len(node.input) == 2:
            self._add(weight, node.input[1], turned=True)
        elif node.op_type == "Gemm" and len(node.input) >= 2:
            self._add(weight, node.input[1], turned=not _attribute(node, "transB", 0))
            self._add(bias, node.input[2] if len(node.input) > 2 else "")
        elif node.op_type == "MatMulNBits":
            self._add_blocks(weight, node)
        elif node.op_type == "Gather" and path.endswith("embed_tokens"):
            self._add(weight, node.input[0])
        elif node.op_type == "Add" and not path.lower().endswith("norm"):
            self._add_vector(bias, node.input)
        elif node.op_type in _NORMS and "norm" in path.lower():
            self._add_vector(weight, node.input)
        elif node.op_type in _SKIP_NORMS:
            self._add_vector(weight, node.input[2:3])
        elif node.op_type == "Add":
            self._add_vector(bias, node.input)

    def _add_vector(self, ours: str, inputs: Any) -> None:
        for name in inputs:
            source, _ = self._follow(name)
            if source is not None and len(self._stored[source].dims) == 1 and self._stored[source].dims[0] > 1:
                self._add(ours, source)
                return

    def _add_blocks(self, ours: str, node: Any) -> None:
        """Take a matrix that is stored in blocks of 4 or 8 bits. Raises: ConversionError for a form that is not known."""
        names = [*node.input[1:], *[""] * 5][:5]
        bits, block = _attribute(node, "bits", 4), _attribute(node, "block_size", 0)
        rows, columns = _attribute(node, "N", 0), _attribute(node, "K", 0)
        known = all(name in self._stored for name in names[:2]) and (not names[2] or names[2] in self._stored)
        if bits not in (4, 8) or names[3] or block < 16 or not known or not 0 < rows * columns <= _MOST_VALUES:
            raise ConversionError(
                f"{node.name[:100]} holds its weights in a quantized form that is not read; export it with precision fp32 or fp16"
            )
        self._used |= {name for name in names[:3] if name}

        def read() -> NDArray[np.float32]:
            stored = [_read(self._stored[name], self._path) if name else None for name in names[:3]]
            return _dequantize(node.name, stored, bits, block, rows, columns)

        self._places.setdefault(ours, _Place(names[0], read))

    def _is_weight(self, name: str, tensor: Any) -> bool:
        is_float = tensor.data_type in _FLOATS and len(tensor.dims) == 2 and min(tensor.dims) >= _LARGE
        return is_float and not _TABLES.search(name)


def _canonical(name: str) -> str | None:
    """Return the Hugging Face name of a tensor, or None for what is no part of a model that is known."""
    found = _PREFIX.fullmatch(name)
    if found is None or not name.endswith((".weight", ".bias")):
        return None
    ours = found[1]
    for pattern, ending in _RENAMED:
        ours = pattern.sub(ending, ours)
    return ours


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), default)


def _location(tensor: Any, graph: Path) -> Path:
    """Return the file that a tensor's values lie in. Raises: ConversionError for one outside the graph's folder."""
    said = str({entry.key: entry.value for entry in tensor.external_data}.get("location", ""))
    if not said or Path(said).name != said or said in (".", ".."):
        raise ConversionError(
            f"{graph.name} reads its weights from {said[:100]!r}, outside its own folder; nothing else is opened"
        )
    path = graph.parent / said
    if not path.is_file():
        raise ConversionError(f"{graph.name} reads its weights from {said[:100]}, which is not there; copy it too")
    return path


def _read(tensor: Any, graph: Path) -> NDArray[np.float32]:
    """Return a constant as float32. I/O: its file. Raises: ConversionError for one that is not whole."""
    dims = tuple(int(size) for size in tensor.dims)
    count = 1
    for size in dims:
        count *= size
    item_bytes = (_FLOATS | _BYTES).get(tensor.data_type, 0)
    if not item_bytes or not 0 < count <= _MOST_VALUES or min(dims, default=1) < 1:
        raise ConversionError(f"tensor {tensor.name[:100]} has the shape {dims} or a type that no weight has")
    try:
        if not tensor.external_data:
            if tensor.raw_data and len(tensor.raw_data) != count * item_bytes:
                raise ValueError(f"{len(tensor.raw_data)} bytes")
            return np.asarray(numpy_helper.to_array(tensor), np.float32)
        raw = _read_outside(tensor, graph, count * item_bytes)
    except (ValueError, TypeError, OverflowError, OSError) as error:
        raise ConversionError(
            f"tensor {tensor.name[:100]} is not as large as its shape {dims} says ({str(error)[:80]}); export it again"
        ) from error
    if tensor.data_type == TensorProto.BFLOAT16:
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(dims)
    kinds = {TensorProto.FLOAT: "<f4", TensorProto.FLOAT16: "<f2", TensorProto.DOUBLE: "<f8", TensorProto.UINT8: "u1"}
    return np.frombuffer(raw, kinds[tensor.data_type]).astype(np.float32).reshape(dims)


def _read_outside(tensor: Any, graph: Path, wanted_bytes: int) -> bytes:
    path = _location(tensor, graph)
    said = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(said.get("offset", 0)), int(said.get("length", wanted_bytes))
    if offset < 0 or length != wanted_bytes or offset + length > path.stat().st_size:
        raise ValueError(f"{length} bytes from {offset} of {path.name}")
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _dequantize(name: str, stored: list[Any], bits: int, block: int, rows: int, columns: int) -> NDArray[np.float32]:
    """Undo `MatMulNBits`' blocks: ``(code - zero) * scale``; float32 ``[rows, columns]``. Raises: ConversionError."""

    def unpack(packed: NDArray[np.float32]) -> NDArray[np.float32]:
        """Split bytes into their halves, the low one first."""
        if bits == 8:
            return packed
        whole = packed.astype(np.uint8)
        return np.stack([whole & 15, whole >> 4], axis=-1).reshape(*whole.shape[:-1], -1).astype(np.float32)

    blocks = -(-columns // block)
    try:
        codes = unpack(stored[0].reshape(rows, blocks, -1)).reshape(rows, blocks, block)
        scales = stored[1].reshape(rows, blocks, 1)
        zeros: Any = float(1 << (bits - 1))
        if stored[2] is not None:
            zeros = unpack(stored[2].reshape(rows, -1))[:, :blocks, None]
        return np.asarray(((codes - zeros) * scales).reshape(rows, -1)[:, :columns], np.float32)
    except ValueError as error:
        raise ConversionError(f"the blocks of {name[:100]} do not fit its dimensions; export it again") from error
