"""Convert a GGUF file of the llama architecture into one ONNX graph for ONNX Runtime's fused operators.

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
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from workers.artifacts import integer
from workers.artifacts.errors import ConversionError
from workers.artifacts.graph import FLOAT, FLOAT16, INT32, INT64, MICROSOFT, GraphWriter
from workers.artifacts.quantize import BLOCK, Blocks, quantize_int4, quantize_int8

Precision = Literal["fp32", "fp16", "int8", "int4"]
"""What each costs in fidelity, as the mean KL divergence from fp32 over SmolLM2-135M's text (a Q4_1 file). All but int4 give a
sequence the same logits to the bit whatever shares its batch.

fp32: the reference.
fp16: for GPUs, whose attention kernel takes nothing wider. 0.0000.
int8: weights in 8 bits with a scale for each output, activations in 16 (see `integer`). 0.005; the fastest on CPUs with int8 units.
int4: the least memory. Rounds a second time what a 4-bit GGUF has rounded already: 0.25.
"""

BATCH_INVARIANT: dict[Precision, bool] = {"fp32": True, "fp16": True, "int8": True, "int4": False}

READABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "Q4_K", "Q5_K")


@dataclass(frozen=True)
class LlamaShape:
    """State a llama's dimensions, as its GGUF metadata gives them."""

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


def read_shape(reader: Any) -> LlamaShape:
    """Read the dimensions. Raises: ConversionError for another architecture or a variant that the graph does not compute."""
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise ConversionError(f"the GGUF file holds a {architecture!r} model; only the llama architecture is converted")
    scaling = _field(reader, "llama.rope.scaling.type", "none")
    names = {tensor.name for tensor in reader.tensors}
    variants = [
        name for name in ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.attn_q_norm.weight") if name in names
    ]
    if scaling not in (None, "none") or variants:
        found = ", ".join(variants) or f"rope scaling {scaling}"
        raise ConversionError(f"the GGUF file uses {found}, which the converter does not compute; take a plain llama")
    heads, hidden = int(_field(reader, "llama.attention.head_count")), int(_field(reader, "llama.embedding_length"))
    head_dim = int(_field(reader, "llama.attention.key_length", hidden // heads))
    rotary = int(_field(reader, "llama.rope.dimension_count", head_dim))
    if rotary != head_dim:
        raise ConversionError(f"the GGUF file rotates {rotary} of {head_dim} dimensions a head; all or none is needed")
    return LlamaShape(
        layers=int(_field(reader, "llama.block_count")),
        hidden=hidden,
        ffn=int(_field(reader, "llama.feed_forward_length")),
        heads=heads,
        kv_heads=int(_field(reader, "llama.attention.head_count_kv", heads)),
        head_dim=head_dim,
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        context_tokens=int(_field(reader, "llama.context_length")),
        rope_base=float(_field(reader, "llama.rope.freq_base", 10_000.0)),
        norm_epsilon=float(_field(reader, "llama.attention.layer_norm_rms_epsilon")),
    )


def convert(source: Path, target: Path, precision: Precision) -> LlamaShape:
    """Write ``source`` (GGUF) as an ONNX graph to ``target`` and return its dimensions.

    I/O: maps the source, writes the target; some seconds of CPU. Raises: ConversionError.
    """
    reader = gguf.GGUFReader(str(source))
    shape = read_shape(reader)
    _LlamaGraph(reader, shape, precision).write(target)
    return shape


def _field(reader: Any, name: str, default: Any = None) -> Any:
    field = reader.fields.get(name)
    if field is None:
        if default is None:
            raise ConversionError(f"the GGUF file has no {name}; it is damaged or of another kind")
        return default
    return field.contents()


class _LlamaGraph:
    """Write the graph of one model, layer by layer."""

    def __init__(self, reader: Any, shape: LlamaShape, precision: Precision) -> None:
        self.shape = shape
        self.precision = precision
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.graph = GraphWriter("llama")
        self.dtype = np.dtype(np.float16 if precision == "fp16" else np.float32)
        self.onnx_dtype = FLOAT16 if precision == "fp16" else FLOAT

    def write(self, target: Path) -> None:
        graph, shape = self.graph, self.shape
        ids = graph.input("input_ids", INT64, ["tokens"])
        graph.input("places", INT64, ["batch", "sequence"])
        graph.input("flat_places", INT64, ["tokens"])
        graph.input("wanted", INT64, ["wanted"])
        graph.input("query_seqlens", INT32, ["batch"])
        graph.input("seqlens_k", INT32, ["batch"])
        graph.input("total_sequence_length", INT32, [1])
        self._rotary_tables()
        embedding = self._read("token_embd.weight")
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
        graph.save(target)

    def _layer(self, layer: int, normed: str, residual: str) -> tuple[str, str]:
        """Add one block; return the next block's normed input and the residual stream."""
        graph, at, last = self.graph, f"blk.{layer}", layer == self.shape.layers - 1
        attended = self._attention(layer, normed)
        if last:
            # only some positions' logits are asked for: from here on the others need no work
            attended = graph.node("Gather", [attended, "wanted"], axis=0)
            residual = graph.node("Gather", [residual, "wanted"], axis=0)
        mixed = self._linear(f"{at}.attn_output", [self._read(f"{at}.attn_output.weight")], attended, "coarse")
        normed, residual = self._add_and_norm(mixed, residual, f"{at}.ffn_norm.weight")
        gate_up = [self._read(f"{at}.ffn_gate.weight"), self._read(f"{at}.ffn_up.weight")]
        both = self._linear(f"{at}.ffn_gate_up", gate_up, normed, "bounded", f"{at}.ffn_norm.weight")
        halves = graph.constant("ffn_halves", np.array([self.shape.ffn, self.shape.ffn], np.int64))
        gate, up = f"{at}.gate", f"{at}.up"
        graph.node("Split", [both, halves], [gate, up], axis=-1)
        # QuickGelu with alpha 1 is x * sigmoid(x): SiLU in one pass.
        active = graph.node("QuickGelu", [gate], domain=MICROSOFT, alpha=1.0)
        product = graph.node("Mul", [active, up])
        fed = self._linear(f"{at}.ffn_down", [self._read(f"{at}.ffn_down.weight")], product, "scaled")
        following = "output_norm.weight" if last else f"blk.{layer + 1}.attn_norm.weight"
        return self._add_and_norm(fed, residual, following)

    def _attention(self, layer: int, normed: str) -> str:
        graph, shape, at = self.graph, self.shape, f"blk.{layer}"
        weights = [
            _unpermute(self._read(f"{at}.attn_q.weight"), shape.heads),
            _unpermute(self._read(f"{at}.attn_k.weight"), shape.kv_heads),
            self._read(f"{at}.attn_v.weight"),
        ]
        packed = self._to_batch(self._linear(f"{at}.attn_qkv", weights, normed, "bounded", f"{at}.attn_norm.weight"))
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
            gain = 0.0 if norm is None else float(np.abs(self._read(norm)).max())
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
        weight = self._read("output.weight") if "output.weight" in self.tensors else embedding
        if self.precision == "int4":
            # it decides between 49,152 words, and 4 bits are seen there
            return self._blocks_matmul("head", quantize_int8(weight), normed)
        if self.precision == "int8" or "output.weight" in self.tensors:
            return self._linear("head", [weight], normed, "bounded", "output_norm.weight")
        # Gemm reads the embedding the other way round, so that the file holds it once.
        table = self.graph.constant("token_embd", embedding.astype(self.dtype))
        flat = self.graph.constant("head_shape", np.array([-1, self.shape.hidden], np.int64))
        return self.graph.node("Gemm", [self.graph.node("Reshape", [normed, flat]), table], transB=1)

    def _rotary_tables(self) -> None:
        half = self.shape.head_dim // 2
        frequencies = self.shape.rope_base ** (-np.arange(half, dtype=np.float64) / half)
        angles = np.arange(self.shape.context_tokens, dtype=np.float64)[:, None] * frequencies[None, :]
        self.graph.constant("rotary_cos", np.cos(angles).astype(self.dtype))
        self.graph.constant("rotary_sin", np.sin(angles).astype(self.dtype))

    def _norm(self, name: str) -> str:
        return self.graph.constant(name, self._read(name).astype(self.dtype))

    def _read(self, name: str) -> NDArray[np.float32]:
        """Dequantize one tensor to float32, ``[out, in]`` for matrices."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ConversionError(f"the GGUF file has no tensor {name}; it is damaged or not a plain llama")
        if tensor.tensor_type.name not in READABLE:
            raise ConversionError(
                f"tensor {name} is stored as {tensor.tensor_type.name}; take a file quantized as one of {', '.join(READABLE)}"
            )
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return np.asarray(values, np.float32).reshape(tuple(int(n) for n in reversed(tensor.shape)))


def _unpermute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo GGUF's interleaving of each head's rows, which serves a rotation of neighbours; ours rotates halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
