"""Read a decoder's dimensions and weights from a GGUF file: llama, qwen2 and qwen3."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.artifacts import decoder
from workers.artifacts.decoder import DecoderShape, Precision
from workers.artifacts.errors import ConversionError
from workers.artifacts.gguf_file import MALFORMED, GgufFile, first_line, open_file
from workers.artifacts.weights import WeightFile

ARCHITECTURES = ("llama", "qwen2", "qwen3")
READABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "Q4_K", "Q5_K")


def convert(source: Path, target: Path, precision: Precision, large: WeightFile | None = None) -> DecoderShape:
    """Write ``source`` (GGUF) as an ONNX graph to ``target`` and return its dimensions. I/O and Raises: as `write`."""
    return write(open_file(source), target, precision, large)


def write(file: GgufFile, target: Path, precision: Precision, large: WeightFile | None = None) -> DecoderShape:
    """Write a file that is open. I/O and Raises: as `decoder.write`."""
    shape = read_shape(file)
    decoder.write(GgufWeights(file, shape), shape, target, precision, large)
    return shape


def read_shape(file: GgufFile) -> DecoderShape:
    """Read the dimensions. Raises: ConversionError for another architecture or a variant that the graph does not compute."""
    architecture = file.read("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConversionError(
            f"the GGUF file holds a {str(architecture)[:40]!r} model; of decoders, {known} are converted"
        )
    try:
        return _read_shape(file, architecture)
    except MALFORMED as error:
        raise ConversionError(f"the GGUF file's dimensions cannot be read: {first_line(error)}") from error


def _read_shape(file: GgufFile, architecture: str) -> DecoderShape:
    def read(name: str, default: Any = None) -> Any:
        return file.read(f"{architecture}.{name}", default)

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
        vocab_size=len(file.read("tokenizer.ggml.tokens")),
        context_tokens=min(int(read("context_length")), decoder.MAX_CONTEXT_TOKENS),
        rope_base=float(read("rope.freq_base", 10_000.0)),
        norm_epsilon=float(read("attention.layer_norm_rms_epsilon")),
    )


class GgufWeights:
    """Implement `decoder.Weights`."""

    def __init__(self, file: GgufFile, shape: DecoderShape) -> None:
        self._tensors = file.tensors
        # llama's files alone interleave the rows of each head, which serves a rotation of neighbours; ours rotates halves
        self._interleaved = file.read("general.architecture") == "llama"
        self._heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}

    def names(self) -> set[str]:
        return set(self._tensors)

    def read(self, name: str) -> NDArray[np.float32]:
        tensor = self._tensors[name]
        if tensor.kind.name not in READABLE:
            raise ConversionError(
                f"tensor {name} is stored as {tensor.kind.name}; take a file quantized as one of {', '.join(READABLE)}"
            )
        try:
            value = tensor.dequantize()
            part = name.split(".")[-2]
            return _unpermute(value, self._heads[part]) if self._interleaved and part in self._heads else value
        except MALFORMED as error:
            raise ConversionError(f"tensor {name} cannot be read: {first_line(error)}") from error


def _unpermute(value: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo the interleaving of each head's rows, of a matrix or a bias."""
    rows = len(value)
    split = value.reshape(heads, rows // heads // 2, 2, *value.shape[1:])
    return split.swapaxes(1, 2).reshape(value.shape)
