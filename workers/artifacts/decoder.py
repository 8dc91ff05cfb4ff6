"""Write a decoder of the llama, qwen2 or qwen3 family as one ONNX graph for ONNX Runtime's fused operators.

Where the weights come from is a `Weights`: `gguf_decoder` reads GGUF files, `safetensors_decoder` Hugging Face folders.

The graph takes tokens of several sequences laid end to end, however many of each. ``input_ids`` int64 ``[tokens]``; ``places`` int64
``[batch, sequence]``: which token stands at each place of the padded batch (any, where none does); ``flat_places`` int64
``[tokens]``: where each stands, counted through the batch; ``query_seqlens`` int32 ``[batch]``: how many of each sequence;
``seqlens_k`` int32 ``[batch]``: tokens in the KV after this call, less one; ``total_sequence_length`` int32 ``[1]``: the most of them;
``wanted`` int64 ``[wanted]``: the tokens whose logits are asked for. For each layer, ``past_key.N`` and ``past_value.N`` float
``[batch, kv_heads, capacity, head_dim]``. It gives ``logits`` float32 ``[wanted, vocab]`` and ``present_key.N``,
``present_value.N``, which must be bound to the memory of the past.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from workers.artifacts import integer
from workers.artifacts.errors import ConversionError
from workers.artifacts.graph import FLOAT, FLOAT16, INT32, INT64, MICROSOFT, GraphWriter
from workers.artifacts.quantize import BLOCK, Blocks, quantize_int4, quantize_int8
from workers.artifacts.weights import WeightFile

Precision = Literal["fp32", "fp16", "int8", "int4"]
"""What each costs in fidelity, as the mean KL divergence from fp32 over SmolLM2-135M's text (a Q4_1 file). All but int4 give a
sequence the same logits to the bit whatever shares its batch.

fp32: the reference.
fp16: for GPUs, whose attention kernel takes nothing wider. 0.0000.
int8: weights in 8 bits with a scale for each output, activations in 16 (see `integer`). 0.005; the fastest on CPUs with int8 units.
int4: the least memory. Rounds a second time what a 4-bit GGUF has rounded already: 0.25.
"""

BATCH_INVARIANT: dict[Precision, bool] = {"fp32": True, "fp16": True, "int8": True, "int4": False}

MAX_CONTEXT_TOKENS = 32_768
"""Longer models are cut to this: the rotation's table is a file's part, and no CPU serves more."""
_MOST_LAYERS, _MOST_WIDTH = 512, 1 << 17
_OPSET = 18
"""The first with operators on the bits of whole numbers."""


@dataclass(frozen=True)
class DecoderShape:
    """State a decoder's dimensions, as its source's metadata give them."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_tokens: int
    rope_base: float
    norm_epsilon: float

    def check(self) -> None:
        """Raise: ConversionError for dimensions that no model has and no graph computes."""
        widths = (self.hidden, self.ffn, self.heads * self.head_dim, self.kv_heads * self.head_dim)
        possible = (
            1 <= self.layers <= _MOST_LAYERS
            and all(1 <= width <= _MOST_WIDTH for width in widths)
            and self.heads >= 1
            and self.kv_heads >= 1
            and self.heads % self.kv_heads == 0
            and self.head_dim % 16 == 0
            and 2 <= self.vocab_size <= 1 << 22
            and self.context_tokens >= 2
            and 1.0 <= self.rope_base < 1e12
            and 0.0 < self.norm_epsilon < 1.0
        )
        if not possible:
            raise ConversionError(f"the source states dimensions that cannot be: {self}")


class Weights(Protocol):
    """Give a source's tensors by GGUF's names, rows of q and k in the order of rotated halves."""

    def names(self) -> set[str]: ...

    def read(self, name: str) -> NDArray[np.float32]:
        """Return one tensor, ``[out, in]`` for matrices. I/O: reads the source. Raises: ConversionError."""
        ...


def write(
    weights: Weights, shape: DecoderShape, target: Path, precision: Precision, large: WeightFile | None = None
) -> None:
    """Write the graph to ``target``, its large constants to ``large`` if that is given.

    I/O: reads the source, writes the target; some seconds of CPU. Raises: ConversionError.
    """
    shape.check()
    _DecoderGraph(weights, shape, precision).write(target, large)


class _DecoderGraph:
    """Write the graph of one model, layer by layer."""

    def __init__(self, weights: Weights, shape: DecoderShape, precision: Precision) -> None:
        self.weights = weights
        self.tensors = weights.names()
        self.unread = set(self.tensors)
        self.shape = shape
        self.precision = precision
        self.graph = GraphWriter("llama", _OPSET)
        self.dtype = np.dtype(np.float16 if precision == "fp16" else np.float32)
        self.onnx_dtype = FLOAT16 if precision == "fp16" else FLOAT

    def write(self, target: Path, large: WeightFile | None) -> None:
        graph, shape = self.graph, self.shape
        ids = graph.input("input_ids", INT64, ["tokens"])
        graph.input("places", INT64, ["batch", "sequence"])
        graph.input("flat_places", INT64, ["tokens"])
        graph.input("wanted", INT64, ["wanted"])
        graph.input("query_seqlens", INT32, ["batch"])
        graph.input("seqlens_k", INT32, ["batch"])
        graph.input("total_sequence_length", INT32, [1])
        self._rotary_tables()
        embedding = self._read("token_embd.weight", shape.vocab_size, shape.hidden)
        residual = self._embed(ids, embedding)
        normed = graph.node(
            "SimplifiedLayerNormalization",
            [residual, self._norm("blk.0.attn_norm.weight")],
            axis=-1,
            epsilon=shape.norm_epsilon,
            stash_type=1,
        )
        for layer in range(shape.layers):
            normed, residual = self._layer(layer, normed, residual)
        logits = self._project_head(normed, embedding)
        if self.precision == "fp16":
            logits = graph.node("Cast", [logits], to=FLOAT)
        flat = graph.constant("logits_shape", np.array([-1, shape.vocab_size], np.int64))
        graph.node("Reshape", [logits, flat], ["logits"])
        graph.output("logits", FLOAT, ["wanted", shape.vocab_size])
        if self.unread:
            some = ", ".join(sorted(self.unread)[:3])
            raise ConversionError(
                f"the source holds tensors that the graph does not compute ({some}); it is another kind of model"
            )
        graph.save(target, large)

    def _layer(self, layer: int, normed: str, residual: str) -> tuple[str, str]:
        """Add one block; return the next block's normed input and the residual stream."""
        graph, at, last = self.graph, f"blk.{layer}", layer == self.shape.layers - 1
        attended = self._attention(layer, normed)
        if last:
            # only some positions' logits are asked for: from here on the others need no work
            attended = graph.node("Gather", [attended, "wanted"], axis=0)
            residual = graph.node("Gather", [residual, "wanted"], axis=0)
        hidden, ffn, heads = self.shape.hidden, self.shape.ffn, self.shape.heads * self.shape.head_dim
        mixed = self._project(f"{at}.attn_output", [(f"{at}.attn_output", hidden)], heads, attended, "coarse")
        normed, residual = self._add_and_norm(mixed, residual, f"{at}.ffn_norm.weight")
        gate_up = [(f"{at}.ffn_gate", ffn), (f"{at}.ffn_up", ffn)]
        both = self._project(f"{at}.ffn_gate_up", gate_up, hidden, normed, "bounded", f"{at}.ffn_norm.weight")
        halves = graph.constant("ffn_halves", np.array([self.shape.ffn, self.shape.ffn], np.int64))
        gate, up = f"{at}.gate", f"{at}.up"
        graph.node("Split", [both, halves], [gate, up], axis=-1)
        # QuickGelu with alpha 1 is x * sigmoid(x): SiLU in one pass.
        active = graph.node("QuickGelu", [gate], domain=MICROSOFT, alpha=1.0)
        product = graph.node("Mul", [active, up])
        fed = self._project(f"{at}.ffn_down", [(f"{at}.ffn_down", hidden)], ffn, product, "scaled")
        following = "output_norm.weight" if last else f"blk.{layer + 1}.attn_norm.weight"
        return self._add_and_norm(fed, residual, following)

    def _attention(self, layer: int, normed: str) -> str:
        graph, shape, at = self.graph, self.shape, f"blk.{layer}"
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        parts = [(f"{at}.attn_q", query), (f"{at}.attn_k", key), (f"{at}.attn_v", key)]
        packed = self._project(f"{at}.attn_qkv", parts, shape.hidden, normed, "bounded", f"{at}.attn_norm.weight")
        if f"{at}.attn_q_norm.weight" in self.tensors:
            packed = self._norm_heads(at, packed)
        packed = self._to_batch(packed)
        cache: list[str | int] = ["batch", shape.kv_heads, "capacity", shape.head_dim]
        past = [graph.input(f"past_{kind}.{layer}", self.onnx_dtype, cache) for kind in ("key", "value")]
        present = [f"present_{kind}.{layer}" for kind in ("key", "value")]
        for name in present:
            graph.output(name, self.onnx_dtype, cache)
        rest = ["seqlens_k", "total_sequence_length", "rotary_cos", "rotary_sin", *[""] * 7, "query_seqlens"]
        attended = graph.node(
            "GroupQueryAttention",
            [packed, "", "", *past, *rest],
            [f"{at}.attended", *present],
            domain=MICROSOFT,
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
        )
        return self._to_tokens(attended, shape.heads * shape.head_dim)

    def _norm_heads(self, at: str, packed: str) -> str:
        """Normalize each head of the queries and keys, as qwen3 does before it rotates them."""
        graph, shape = self.graph, self.shape
        sizes = [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2]
        names = [f"{at}.query", f"{at}.key", f"{at}.value"]
        graph.node("Split", [packed, graph.constant("qkv_sizes", np.array(sizes, np.int64))], names, axis=-1)
        apart = graph.constant("heads_shape", np.array([0, -1, shape.head_dim], np.int64))
        together = graph.constant("features_shape", np.array([0, 1, -1], np.int64))
        normed = []
        for name, part in zip(names[:2], ("attn_q_norm", "attn_k_norm"), strict=True):
            gain = self._norm(f"{at}.{part}.weight", shape.head_dim)
            heads = graph.node("Reshape", [name, apart])
            heads = graph.node(
                "SimplifiedLayerNormalization", [heads, gain], axis=-1, epsilon=shape.norm_epsilon, stash_type=1
            )
            normed.append(graph.node("Reshape", [heads, together]))
        return graph.node("Concat", [*normed, names[2]], axis=-1)

    def _to_batch(self, value: str) -> str:
        """Lay tokens ``[tokens, 1, features]`` out as ``[batch, sequence, features]``."""
        flat = self.graph.constant("batch_shape", np.array([0, 0, -1], np.int64))
        return self.graph.node("Reshape", [self.graph.node("Gather", [value, "places"], axis=0), flat])

    def _to_tokens(self, value: str, features: int) -> str:
        flat = self.graph.constant(f"tokens_shape_{features}", np.array([-1, 1, features], np.int64))
        return self.graph.node("Gather", [self.graph.node("Reshape", [value, flat]), "flat_places"], axis=0)

    def _add_and_norm(self, value: str, residual: str, norm: str) -> tuple[str, str]:
        normed, total = f"{norm}.out", f"{norm}.residual"
        self.graph.node(
            "SkipSimplifiedLayerNormalization",
            [value, residual, self._norm(norm)],
            [normed, "", "", total],
            domain=MICROSOFT,
            epsilon=self.shape.norm_epsilon,
        )
        return normed, total

    def _project(
        self,
        name: str,
        parts: list[tuple[str, int]],
        inputs: int,
        value: str,
        activations: integer.Activations,
        norm: str | None = None,
    ) -> str:
        """Multiply by the matrices of ``parts`` (name, outputs), laid side by side, and add the biases that there are."""
        weights = [self._read(f"{part}.weight", outputs, inputs) for part, outputs in parts]
        product = self._linear(name, weights, value, activations, norm)
        if not any(f"{part}.bias" in self.tensors for part, _ in parts):
            return product
        biases = [
            self._read(f"{part}.bias", outputs) if f"{part}.bias" in self.tensors else np.zeros(outputs, np.float32)
            for part, outputs in parts
        ]
        return self.graph.node(
            "Add", [product, self.graph.constant(f"{name}.bias", np.concatenate(biases).astype(self.dtype))]
        )

    def _linear(
        self,
        name: str,
        weights: list[NDArray[np.float32]],
        value: str,
        activations: integer.Activations,
        norm: str | None = None,
    ) -> str:
        """Multiply by one matrix, or by several at once whose outputs are laid side by side.

        ``norm`` names the gain of the normalization that ``value`` comes from: it bounds ``bounded`` activations, since what is
        normalized to a root mean square of 1 has no value above the root of its length.
        """
        weight = weights[0] if len(weights) == 1 else np.concatenate(weights)
        if self.precision == "int8":
            gain = 0.0 if norm is None else float(np.abs(self._read(norm, self.shape.hidden)).max())
            bound = gain * float(np.sqrt(weight.shape[1]))
            return integer.integer_matmul(self.graph, name, weight, value, activations, bound)
        if self.precision == "int4":
            return self._blocks_matmul(name, quantize_int4(weight), value)
        return self._float_matmul(name, weight, value)

    def _float_matmul(self, name: str, weight: NDArray[np.float32], value: str) -> str:
        return self.graph.node("MatMul", [value, self.graph.constant(name, weight.T.astype(self.dtype))])

    def _blocks_matmul(self, name: str, blocks: Blocks, value: str) -> str:
        graph = self.graph
        inputs = [
            value,
            graph.constant(f"{name}.codes", blocks.codes),
            graph.constant(f"{name}.scales", blocks.scales),
        ]
        if blocks.zero_points is not None:
            inputs.append(graph.constant(f"{name}.zero_points", blocks.zero_points))
        rows, count = blocks.scales.shape
        return graph.node(
            "MatMulNBits",
            inputs,
            domain=MICROSOFT,
            K=count * BLOCK,
            N=rows,
            bits=blocks.bits,
            block_size=BLOCK,
            accuracy_level=4,  # activations rounded to int8: the fast kernels
        )

    def _embed(self, ids: str, embedding: NDArray[np.float32]) -> str:
        """Look up ``[tokens, 1, hidden]``."""
        graph = self.graph
        flat = graph.constant("hidden_shape", np.array([-1, 1, self.shape.hidden], np.int64))
        if self.precision not in ("int8", "int4"):
            table = graph.constant("token_embd", embedding.astype(self.dtype))
            return graph.node("Reshape", [graph.node("Gather", [table, ids], axis=0), flat])
        # a Q8_0 table comes through unchanged
        blocks = quantize_int8(embedding)
        codes = graph.node("Gather", [graph.constant("token_embd.codes", blocks.codes), ids], axis=0)
        scales = graph.node("Gather", [graph.constant("token_embd.scales", blocks.scales), ids], axis=0)
        whole = graph.node("Cast", [codes], to=FLOAT)
        centred = graph.node("Sub", [whole, graph.constant("token_embd.middle", np.array(128.0, np.float32))])
        spread = graph.node("Unsqueeze", [scales, graph.constant("last_axis", np.array([-1], np.int64))])
        return graph.node("Reshape", [graph.node("Mul", [centred, spread]), flat])

    def _project_head(self, normed: str, embedding: NDArray[np.float32]) -> str:
        tied = "output.weight" not in self.tensors
        weight = embedding if tied else self._read("output.weight", self.shape.vocab_size, self.shape.hidden)
        if self.precision == "int4":
            # it decides between 49,152 words, and 4 bits are seen there
            return self._blocks_matmul("head", quantize_int8(weight), normed)
        if self.precision == "int8" or not tied:
            return self._linear("head", [weight], normed, "bounded", "output_norm.weight")
        # Gemm reads the embedding the other way round, so that the file holds it once.
        table = self.graph.constant("token_embd", embedding.astype(self.dtype))
        flat = self.graph.constant("head_shape", np.array([-1, self.shape.hidden], np.int64))
        return self.graph.node("Gemm", [self.graph.node("Reshape", [normed, flat]), table], transB=1)

    def _rotary_tables(self) -> None:
        half = self.shape.head_dim // 2
        frequencies = self.shape.rope_base ** (-np.arange(half, dtype=np.float64) / half)
        if "rope_freqs.weight" in self.tensors:
            # llama 3.1 stretches its slow rotations by factors that it brings along
            frequencies = frequencies / np.maximum(self._read("rope_freqs.weight", half).astype(np.float64), 1e-6)
        angles = np.arange(self.shape.context_tokens, dtype=np.float64)[:, None] * frequencies[None, :]
        self.graph.constant("rotary_cos", np.cos(angles).astype(self.dtype))
        self.graph.constant("rotary_sin", np.sin(angles).astype(self.dtype))

    def _norm(self, name: str, size: int | None = None) -> str:
        return self.graph.constant(name, self._read(name, size or self.shape.hidden).astype(self.dtype))

    def _read(self, name: str, *dimensions: int) -> NDArray[np.float32]:
        """Read one tensor, which must have these dimensions. Raises: ConversionError."""
        if name not in self.tensors:
            raise ConversionError(f"the source has no tensor {name}; it is damaged or of another kind")
        self.unread.discard(name)
        value = self.weights.read(name)
        if value.shape != dimensions:
            raise ConversionError(
                f"tensor {name} has the shape {value.shape}; by the source's own dimensions it is {dimensions}"
            )
        if not np.isfinite(value).all():
            raise ConversionError(f"tensor {name} holds values that are not finite; the source is damaged")
        return value
