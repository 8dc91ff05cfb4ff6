"""Convert a sentence encoder or classifier of BERT's kind (under BERT's names, see `encoder_families`) into fused ONNX graphs.

Two graphs share one file of weights. `GRAPH_FILE` takes ``input_ids`` int64 ``[batch, sequence]``, all of one length, and does no work
for masks. `PADDED_GRAPH_FILE` also takes ``lengths`` int32 ``[batch]``: what lies right of a row's length is padding. Both give
``sentence_embedding`` float32 ``[batch, hidden]``, of length 1 where the model says so; those of classifiers ``scores`` float32
``[batch, labels]``, from 0 to 1.

``LayerNormalization`` after a plain ``Add`` and ``Gelu`` after a product with bias are, on CPUs, several times as fast as the fused
``SkipLayerNormalization`` and ``BiasGelu``; and attention without a mask nearly twice as fast as with one (decision 0020).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from aiscale.wire.manifest import GRAPH_FILE, PADDED_GRAPH_FILE
from workers.artifacts.calibration import Observed, observe
from workers.artifacts.codes import FINER, ZERO_CODE, choose_codes
from workers.artifacts.errors import ConversionError
from workers.artifacts.graph import FLOAT, INT32, INT64, MICROSOFT, GraphWriter
from workers.artifacts.integer import store_codes
from workers.artifacts.rounding import round_to_int8
from workers.artifacts.weights import WEIGHTS_FILE, WeightFile

Precision = Literal["fp32", "int8"]

_HEADROOM = 2.0
"""How much further than the sample's inputs the codes reach; what lies beyond is cut."""
_MOST_COPIES = 24
"""Further columns for wide channels (see `codes`): gathering a value costs as much as multiplying it some hundred times."""


@dataclass(frozen=True)
class BertShape:
    """State a BERT's dimensions and its pooling, as its configuration gives them."""

    layers: int
    hidden: int
    heads: int
    positions: int
    vocab_size: int
    norm_epsilon: float
    pooling: Literal["mean", "cls"] = "mean"
    normalize: bool = True
    labels: tuple[str, ...] = ()
    """Of a classifier of whole texts."""
    scores: Literal["one", "each"] = "one"
    """Whether one of the labels holds, or each by itself."""
    first_position: int = 0
    """Where in the table the position of a text's first token is; what lies before is of no text."""
    head: Literal["Tanh", "Relu"] = "Tanh"
    """What is done between a classifier's two products."""

    @property
    def context_tokens(self) -> int:
        return self.positions - self.first_position


def convert(
    tensors: Mapping[str, NDArray[Any]],
    shape: BertShape,
    target: Path,
    precision: Precision,
    sample: list[list[int]],
) -> None:
    """Write the graphs and their weights into the folder ``target``.

    ``sample`` is text as token ids, which shows for int8 what the products are fed with. I/O: some seconds of CPU, writes ``target``.
    Raises: ConversionError.
    """
    named = {name.removeprefix("bert."): value for name, value in tensors.items()}
    seen: dict[str, Observed] | None = None
    if precision == "int8":
        seen = _observe(named, shape, target, sample)
    rounded: dict[str, tuple[NDArray[Any], NDArray[np.float32]]] = {}
    with WeightFile(target / WEIGHTS_FILE) as weights:
        for name, padded in ((GRAPH_FILE, False), (PADDED_GRAPH_FILE, True)):
            _BertGraph(named, shape, seen, rounded).write(target / name, weights, padded=padded)


def _observe(
    named: dict[str, NDArray[Any]], shape: BertShape, target: Path, sample: list[list[int]]
) -> dict[str, Observed]:
    """Run the fp32 graph over the sample and watch what each product is fed with."""
    graph, path = _BertGraph(named, shape, None, {}), target / "probe.onnx"
    try:
        graph.write(path, None, padded=False, probe=True)
        return observe(path, graph.fed, sample)
    finally:
        path.unlink(missing_ok=True)


def convert_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer.json without its padding and truncation, which would hide the true number of tokens."""
    tokenizer = Tokenizer.from_file(str(source))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(target), pretty=False)


class _BertGraph:
    """Write one graph. With ``seen``, products are computed with eight-bit weights; ``rounded`` keeps these between graphs."""

    def __init__(
        self,
        tensors: dict[str, NDArray[Any]],
        shape: BertShape,
        seen: dict[str, Observed] | None,
        rounded: dict[str, tuple[NDArray[Any], NDArray[np.float32]]],
    ) -> None:
        self.shape = shape
        self.tensors = tensors
        self.seen = seen
        self.rounded = rounded
        self.fed: dict[str, str] = {}
        """The name of the tensor that each site's products are fed with."""
        self.graph = GraphWriter("bert")

    def write(self, target: Path, weights: WeightFile | None, *, padded: bool, probe: bool = False) -> None:
        graph, shape = self.graph, self.shape
        ids = graph.input("input_ids", INT64, ["batch", "sequence"])
        lengths = graph.input("lengths", INT32, ["batch"]) if padded else ""
        extent = graph.node("Shape", [ids])
        wide = graph.constant("shape.hidden", np.array([shape.hidden], np.int64))
        self.three = graph.node("Concat", [extent, wide], axis=0)
        self.two = graph.constant("shape.rows", np.array([-1, shape.hidden], np.int64))
        hidden = self._embed(ids, extent)
        for layer in range(shape.layers):
            hidden = self._layer(f"encoder.layer.{layer}", hidden, lengths)
        states = graph.node("Reshape", [hidden, self.three])
        if shape.labels:
            self._classify(states)
            graph.output("scores", FLOAT, ["batch", len(shape.labels)])
        else:
            self._pool(states, extent, lengths)
            graph.output("sentence_embedding", FLOAT, ["batch", shape.hidden])
        if probe:
            for name in dict.fromkeys(self.fed.values()):
                graph.output(name, FLOAT, ["rows", "features"])
        graph.save(target, weights)

    def _embed(self, ids: str, extent: str) -> str:
        """Add up the embeddings of tokens and positions. All texts are segment 0, whose vector the positions carry, if there is one."""
        graph, shape = self.graph, self.shape
        positions = self._read("embeddings.position_embeddings.weight")
        if len(positions) != shape.positions:
            raise ConversionError(
                f"the weights have {len(positions)} positions, and their configuration {shape.positions}"
            )
        segments = self.tensors.get("embeddings.token_type_embeddings.weight")
        segment = np.float32(0) if segments is None else np.asarray(segments[0], np.float32)
        table = graph.constant("positions", positions[shape.first_position :] + segment)
        length = graph.node("Slice", [extent, self._number("one", 1), self._number("two", 2)])
        places = graph.node("Slice", [table, self._number("zero", 0), length])
        words = graph.node("Gather", [self._tensor("embeddings.word_embeddings.weight"), ids], axis=0)
        rows = graph.node("Reshape", [graph.node("Add", [words, places]), self.two])
        return self._norm(rows, "embeddings.LayerNorm")

    def _layer(self, at: str, hidden: str, lengths: str) -> str:
        graph = self.graph
        parts = [f"{at}.attention.self.{part}" for part in ("query", "key", "value")]
        projected = [
            graph.node("Reshape", [value, self.three]) for value in self._products(f"{at}.attention", parts, hidden)
        ]
        attended = graph.node(
            "MultiHeadAttention",
            [*projected, "", lengths] if lengths else projected,
            domain=MICROSOFT,
            num_heads=self.shape.heads,
        )
        output = f"{at}.attention.output"
        [mixed] = self._products(output, [f"{output}.dense"], graph.node("Reshape", [attended, self.two]))
        hidden = self._norm(graph.node("Add", [mixed, hidden]), f"{output}.LayerNorm")
        [wide] = self._products(f"{at}.intermediate", [f"{at}.intermediate.dense"], hidden)
        active = graph.node("Gelu", [wide], domain=MICROSOFT)
        [fed] = self._products(f"{at}.output", [f"{at}.output.dense"], active)
        return self._norm(graph.node("Add", [fed, hidden]), f"{at}.output.LayerNorm")

    def _products(self, site: str, names: list[str], value: str) -> list[str]:
        """Multiply one input by several weights and add their biases."""
        self.fed[site] = value
        if self.seen is None:
            return [self._float_product(name, value) for name in names]
        self._round(names, self.seen[site].moment)
        if len(names) == 1 and self.shape.hidden == len(self.seen[site].lows):
            return [self._joined_product(site, names[0], value, self.seen[site])]
        codes = self._quantize(site, value, self.seen[site])
        return [self._integer_product(name, codes) for name in names]

    def _float_product(self, name: str, value: str) -> str:
        weight, bias = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")
        return self.graph.node("Gemm", [value, weight, bias], transB=1)

    def _quantize(self, site: str, value: str, seen: Observed) -> list[tuple[str, str, str]]:
        """Write an input in twice eight bits, the second of what the first leaves: (codes, scale, zero point) each.

        The ranges are fixed, so that a text's vector does not hang on what shares its batch. BERT's activations have a few channels
        ten times as wide as all others: eight bits alone lose the narrow ones (cosine 0.992), sixteen do not (decision 0020).
        """
        graph = self.graph
        low = min(float(seen.lows.min()), 0.0) * _HEADROOM
        high = max(float(seen.highs.max()), 1e-3) * _HEADROOM
        step = np.float32((high - low) / 255)
        scale = graph.constant(f"{site}.scale", np.array(step))
        zero = graph.constant(f"{site}.zero", np.array(np.clip(np.rint(-low / step), 0, 255), np.uint8))
        first = graph.node("QuantizeLinear", [value, scale, zero])
        rest = graph.node("Sub", [value, graph.node("DequantizeLinear", [first, scale, zero])])
        fine = graph.constant(f"{site}.fine", np.array(step / np.float32(254)))
        middle = graph.constant("middle", np.array(128, np.uint8))
        return [(first, scale, zero), (graph.node("QuantizeLinear", [rest, fine, middle]), fine, middle)]

    def _integer_product(self, name: str, inputs: list[tuple[str, str, str]]) -> str:
        codes, scales = self.rounded[name]
        (weight, middle), spread = store_codes(self.graph, name, codes), self.graph.constant(f"{name}.scales", scales)
        bias = self._tensor(f"{name}.bias")
        parts: list[str] = []
        for codes_name, scale, zero in inputs:
            given = [codes_name, weight, scale, spread, zero, middle, *([bias] if not parts else ())]
            parts.append(self.graph.node("MatMulIntegerToFloat", given, domain=MICROSOFT))
        return self.graph.node("Add", parts)

    def _joined_product(self, site: str, name: str, value: str, seen: Observed) -> str:
        """Multiply an input, what its codes leave of it, and the further columns of its wide channels in one product.

        One product writes its floats once, which is what costs most where they are many. Where the input is wider than the output,
        or shared by three products, two products a weight are faster.
        """
        graph, plan = self.graph, choose_codes(seen.lows, seen.highs, _MOST_COPIES)
        scale = graph.constant(f"{site}.scale", np.array(plan.step, np.float32))
        fine = graph.constant(f"{site}.fine", np.array(plan.step / FINER, np.float32))
        zero = graph.constant("middle", np.array(ZERO_CODE, np.uint8))
        first = graph.node("QuantizeLinear", [value, scale, zero])
        rest = graph.node("Sub", [value, graph.node("DequantizeLinear", [first, scale, zero])])
        parts = [first, graph.node("QuantizeLinear", [rest, fine, zero])]
        if len(plan.copied):
            wide = graph.node("Gather", [value, graph.constant(f"{site}.wide", plan.copied)], axis=1)
            moved = graph.node("Sub", [wide, graph.constant(f"{site}.shifts", plan.shifts)])
            parts.append(graph.node("QuantizeLinear", [moved, scale, zero]))
        codes, scales = self.rounded[name]
        excess = (plan.excess @ codes.astype(np.float64)) * scales
        weight, middle = store_codes(graph, name, plan.widen(codes))
        given = [
            graph.node("Concat", parts, axis=1),
            weight,
            scale,
            graph.constant(f"{name}.scales", scales),
            zero,
            middle,
            graph.constant(f"{name}.bias", (self._read(f"{name}.bias") - excess).astype(np.float32)),
        ]
        return graph.node("MatMulIntegerToFloat", given, domain=MICROSOFT)

    def _round(self, names: list[str], moment: NDArray[np.float64]) -> None:
        """Round the weights of one site together, once for all graphs; they are kept as ``[in, out]``."""
        if names[0] in self.rounded:
            return
        weights = [self._read(f"{name}.weight") for name in names]
        codes, scales = round_to_int8(np.concatenate(weights), moment)
        ends = np.cumsum([len(weight) for weight in weights])[:-1]
        for name, part, scale in zip(names, np.split(codes, ends), np.split(scales, ends), strict=True):
            self.rounded[name] = np.ascontiguousarray(part.T), scale

    def _norm(self, value: str, name: str) -> str:
        gain, bias = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")
        return self.graph.node(
            "LayerNormalization", [value, gain, bias], axis=-1, epsilon=self.shape.norm_epsilon, stash_type=1
        )

    def _classify(self, hidden: str) -> None:
        """Score the labels by the first token's vector."""
        graph, shape = self.graph, self.shape
        rows = len(self._read("classifier.weight"))
        if rows != len(shape.labels):
            raise ConversionError(
                f"the classifier tells {rows} labels apart, and its configuration names {len(shape.labels)}"
            )
        first = graph.node("Gather", [hidden, graph.constant("first", np.array(0, np.int64))], axis=1)
        pooled = graph.node(shape.head, [self._float_product("pooler.dense", first)])
        logits = self._float_product("classifier", pooled)
        if shape.scores == "one":
            graph.node("Softmax", [logits], ["scores"], axis=-1)
        else:
            graph.node("Sigmoid", [logits], ["scores"])

    def _pool(self, hidden: str, extent: str, lengths: str) -> None:
        """Take the first token's vector or the mean over a text's tokens, and scale it to length 1."""
        graph, shape = self.graph, self.shape
        if shape.pooling == "cls":
            pooled = graph.node("Gather", [hidden, graph.constant("first", np.array(0, np.int64))], axis=1)
        elif not lengths:
            pooled = graph.node("ReduceMean", [hidden], axes=[1], keepdims=0)
        else:
            pooled = self._masked_mean(hidden, extent, lengths)
        if not shape.normalize:
            graph.node("Identity", [pooled], ["sentence_embedding"])
            return
        length = graph.node("ReduceL2", [pooled], axes=[-1], keepdims=1)
        floor = graph.constant("length.floor", np.array(1e-12, np.float32))
        graph.node("Div", [pooled, graph.node("Max", [length, floor])], ["sentence_embedding"])

    def _masked_mean(self, hidden: str, extent: str, lengths: str) -> str:
        """Average over each text's own tokens: ``mask [b,1,s] @ hidden [b,s,h]``, divided by the lengths."""
        graph = self.graph
        last = graph.node("Squeeze", [graph.node("Slice", [extent, self._number("one", 1), self._number("two", 2)])])
        zero, one = graph.constant("from", np.array(0, np.int64)), graph.constant("step", np.array(1, np.int64))
        places = graph.node("Cast", [graph.node("Range", [zero, last, one])], to=INT32)
        column = graph.node("Unsqueeze", [lengths, self._number("one", 1)])
        inside = graph.node("Cast", [graph.node("Less", [places, column])], to=FLOAT)
        weights = graph.node("Unsqueeze", [inside, self._number("one", 1)])
        total = graph.node("Squeeze", [graph.node("MatMul", [weights, hidden]), self._number("one", 1)])
        return graph.node("Div", [total, graph.node("Cast", [column], to=FLOAT)])

    def _number(self, name: str, value: int) -> str:
        return self.graph.constant(f"number.{name}", np.array([value], np.int64))

    def _tensor(self, name: str) -> str:
        return self.graph.constant(name, self._read(name))

    def _read(self, name: str) -> NDArray[np.float32]:
        value = self.tensors.get(name)
        if value is None:
            raise ConversionError(
                f"the weights have no tensor {name}; they are damaged, or not of the kind that their configuration says"
            )
        return np.asarray(value, np.float32)
