"""Convert a BERT sentence encoder (safetensors, Hugging Face names) into one ONNX graph with fused operators.

The graph takes ``input_ids`` and ``attention_mask``, int64 ``[batch, sequence]``, mask 1 for tokens and 0 for padding on the
right, and gives ``sentence_embedding`` float32 ``[batch, hidden]``: the mean over the tokens, of length 1.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from workers.artifacts.errors import ConversionError
from workers.artifacts.graph import FLOAT, INT32, INT64, MICROSOFT, GraphWriter


@dataclass(frozen=True)
class BertShape:
    """State a BERT's dimensions, as its config.json gives them."""

    layers: int
    hidden: int
    heads: int
    positions: int
    vocab_size: int
    norm_epsilon: float


def read_shape(config: Path) -> BertShape:
    """Read the dimensions. I/O: one small file. Raises: ConversionError for another architecture or activation."""
    said = json.loads(config.read_text(encoding="utf-8"))
    if said.get("model_type") != "bert" or said.get("hidden_act") != "gelu":
        raise ConversionError(
            f"the configuration describes a {said.get('model_type')} with {said.get('hidden_act')}; "
            "only BERT with the exact GELU is converted"
        )
    return BertShape(
        layers=said["num_hidden_layers"],
        hidden=said["hidden_size"],
        heads=said["num_attention_heads"],
        positions=said["max_position_embeddings"],
        vocab_size=said["vocab_size"],
        norm_epsilon=said["layer_norm_eps"],
    )


def convert(weights: Path, config: Path, target: Path) -> BertShape:
    """Write the graph to ``target`` in fp32 and return the dimensions. I/O: reads both sources. Raises: ConversionError."""
    shape = read_shape(config)
    _BertGraph(load_file(str(weights)), shape).write(target)
    return shape


def convert_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer.json without its padding and truncation, which would hide the true number of tokens."""
    tokenizer = Tokenizer.from_file(str(source))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(target), pretty=False)


class _BertGraph:
    def __init__(self, tensors: dict[str, NDArray[Any]], shape: BertShape) -> None:
        self.shape = shape
        self.tensors = {name.removeprefix("bert."): value for name, value in tensors.items()}
        self.graph = GraphWriter("bert")

    def write(self, target: Path) -> None:
        graph = self.graph
        ids = graph.input("input_ids", INT64, ["batch", "sequence"])
        mask = graph.input("attention_mask", INT64, ["batch", "sequence"])
        mask32 = graph.node("Cast", [mask], to=INT32)
        hidden = self._embed(graph.node("Cast", [ids], to=INT32))
        for layer in range(self.shape.layers):
            hidden = self._layer(f"encoder.layer.{layer}", hidden, mask32)
        self._pool(hidden, mask)
        graph.output("sentence_embedding", FLOAT, ["batch", self.shape.hidden])
        graph.save(target)

    def _embed(self, ids: str) -> str:
        tables = [self._tensor(f"embeddings.{kind}_embeddings.weight") for kind in ("word", "position", "token_type")]
        norm = [self._tensor(f"embeddings.LayerNorm.{part}") for part in ("weight", "bias")]
        segments = self.graph.node("Sub", [ids, ids])  # all texts are segment 0
        return self.graph.node(
            "EmbedLayerNormalization",
            [ids, segments, *tables, *norm],
            ["embedded", "embedded.mask_index"],
            domain=MICROSOFT,
            epsilon=self.shape.norm_epsilon,
        )

    def _layer(self, at: str, hidden: str, mask: str) -> str:
        graph = self.graph
        parts = [f"{at}.attention.self.{part}" for part in ("query", "key", "value")]
        weight = np.concatenate([self._read(f"{part}.weight") for part in parts]).T
        bias = np.concatenate([self._read(f"{part}.bias") for part in parts])
        attended = graph.node(
            "Attention",
            [hidden, graph.constant(f"{at}.qkv", weight), graph.constant(f"{at}.qkv.bias", bias), mask],
            domain=MICROSOFT,
            num_heads=self.shape.heads,
        )
        mixed = self._matmul(f"{at}.attention.output.dense", attended)
        hidden = self._add_and_norm(f"{at}.attention.output", mixed, hidden)
        wide = self._matmul(f"{at}.intermediate.dense", hidden)
        active = graph.node("BiasGelu", [wide, self._tensor(f"{at}.intermediate.dense.bias")], domain=MICROSOFT)
        return self._add_and_norm(f"{at}.output", self._matmul(f"{at}.output.dense", active), hidden)

    def _matmul(self, name: str, value: str) -> str:
        weight = self.graph.constant(f"{name}.transposed", self._read(f"{name}.weight").T)
        return self.graph.node("MatMul", [value, weight])

    def _add_and_norm(self, at: str, value: str, residual: str) -> str:
        names = ("LayerNorm.weight", "LayerNorm.bias", "dense.bias")
        return self.graph.node(
            "SkipLayerNormalization",
            [value, residual, *(self._tensor(f"{at}.{name}") for name in names)],
            domain=MICROSOFT,
            epsilon=self.shape.norm_epsilon,
        )

    def _pool(self, hidden: str, mask: str) -> None:
        """Average over the tokens and scale to length 1. The average is one product: ``mask [b,1,s] @ hidden [b,s,h]``."""
        graph = self.graph
        weights = graph.node("Unsqueeze", [graph.node("Cast", [mask], to=FLOAT), self._axes("middle", 1)])
        total = graph.node("Squeeze", [graph.node("MatMul", [weights, hidden]), self._axes("middle", 1)])
        # The mean differs from the sum by a factor that the scaling to length 1 takes out.
        length = graph.node("ReduceL2", [total], axes=[-1], keepdims=1)
        floor = graph.constant("length.floor", np.array(1e-12, np.float32))
        graph.node("Div", [total, graph.node("Max", [length, floor])], ["sentence_embedding"])

    def _axes(self, name: str, axis: int) -> str:
        return self.graph.constant(f"axes.{name}", np.array([axis], np.int64))

    def _tensor(self, name: str) -> str:
        return self.graph.constant(name, self._read(name))

    def _read(self, name: str) -> NDArray[np.float32]:
        value = self.tensors.get(name)
        if value is None:
            raise ConversionError(f"the weights have no tensor {name}; they are damaged or not a BERT")
        return np.asarray(value, np.float32)
