"""Read a decoder's dimensions and weights from a GGUF file: llama, qwen2 and qwen3."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from workers.artifacts import decoder
from workers.artifacts.decoder import DecoderShape, Precision
from workers.artifacts.errors import ConversionError
from workers.artifacts.weights import WeightFile

ARCHITECTURES = ("llama", "qwen2", "qwen3")
READABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "Q4_K", "Q5_K")
_MALFORMED = (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    UnicodeDecodeError,
    AssertionError,
)
"""What the reader raises for bytes that are no GGUF file, or only its first part."""


def open_file(source: Path) -> Any:
    """Return a reader of the file's metadata and tensors. I/O: maps the file. Raises: ConversionError."""
    try:
        return gguf.GGUFReader(str(source))
    except _MALFORMED as error:
        raise ConversionError(
            f"{source.name} is not a whole GGUF file ({_first_line(error)}); download it again"
        ) from error


def convert(source: Path, target: Path, precision: Precision, large: WeightFile | None = None) -> DecoderShape:
    """Write ``source`` (GGUF) as an ONNX graph to ``target`` and return its dimensions. I/O and Raises: as `decoder.write`."""
    reader = open_file(source)
    shape = read_shape(reader)
    decoder.write(GgufWeights(reader, shape), shape, target, precision, large)
    return shape


def read_shape(reader: Any) -> DecoderShape:
    """Read the dimensions. Raises: ConversionError for another architecture or a variant that the graph does not compute."""
    architecture = read_field(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConversionError(
            f"the GGUF file holds a {str(architecture)[:40]!r} model; of decoders, {known} are converted"
        )
    try:
        return _read_shape(reader, architecture)
    except _MALFORMED as error:
        raise ConversionError(f"the GGUF file's dimensions cannot be read: {_first_line(error)}") from error


def _read_shape(reader: Any, architecture: str) -> DecoderShape:
    def read(name: str, default: Any = None) -> Any:
        return read_field(reader, f"{architecture}.{name}", default)

    scaling, experts = read("rope.scaling.type", "none"), int(read("expert_count", 0))
    if scaling not in ("none", "") or experts:
        found = f"{experts} experts" if experts else f"rope scaling {scaling}"
        raise ConversionError(f"the GGUF file uses {found}, which the converter does not compute; take a plain model")
    heads, hidden = int(read("attention.head_count")), int(read("embedding_length"))
    head_dim = int(read("attention.key_length", hidden // max(heads, 1)))
    rotary = int(read("rope.dimension_count", head_dim))
    if rotary != head_dim:
        raise ConversionError(f"the GGUF file rotates {rotary} of {head_dim} dimensions a head; all or none is needed")
    return DecoderShape(
        layers=int(read("block_count")),
        hidden=hidden,
        ffn=int(read("feed_forward_length")),
        heads=heads,
        kv_heads=int(read("attention.head_count_kv", heads)),
        head_dim=head_dim,
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        context_tokens=min(int(read("context_length")), decoder.MAX_CONTEXT_TOKENS),
        rope_base=float(read("rope.freq_base", 10_000.0)),
        norm_epsilon=float(read("attention.layer_norm_rms_epsilon")),
    )


def read_field(reader: Any, name: str, default: Any = None) -> Any:
    """Return a metadata value. Raises: ConversionError when it is missing and there is no default, or cannot be read."""
    field = reader.fields.get(name)
    if field is None:
        if default is None:
            raise ConversionError(f"the GGUF file has no {name}; it is damaged or of another kind")
        return default
    try:
        return field.contents()
    except _MALFORMED as error:
        raise ConversionError(f"the GGUF file's {name} cannot be read: {_first_line(error)}") from error


class GgufWeights:
    """Implement `decoder.Weights`."""

    def __init__(self, reader: Any, shape: DecoderShape) -> None:
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        if len(self._tensors) != len(reader.tensors):
            raise ConversionError("the GGUF file names a tensor twice; it is damaged")
        # llama's files alone interleave the rows of each head, which serves a rotation of neighbours; ours rotates halves
        self._interleaved = read_field(reader, "general.architecture") == "llama"
        self._heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}

    def names(self) -> set[str]:
        return set(self._tensors)

    def read(self, name: str) -> NDArray[np.float32]:
        tensor = self._tensors[name]
        if tensor.tensor_type.name not in READABLE:
            raise ConversionError(
                f"tensor {name} is stored as {tensor.tensor_type.name}; take a file quantized as one of {', '.join(READABLE)}"
            )
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            value = np.asarray(values, np.float32).reshape(tuple(int(n) for n in reversed(tensor.shape)))
            part = name.split(".")[-2]
            return _unpermute(value, self._heads[part]) if self._interleaved and part in self._heads else value
        except _MALFORMED as error:
            raise ConversionError(f"tensor {name} cannot be read: {_first_line(error)}") from error


def _unpermute(value: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo the interleaving of each head's rows, of a matrix or a bias."""
    rows = len(value)
    split = value.reshape(heads, rows // heads // 2, 2, *value.shape[1:])
    return split.swapaxes(1, 2).reshape(value.shape)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
