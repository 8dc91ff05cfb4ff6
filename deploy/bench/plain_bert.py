"""Write a BERT as a plain export does: no fused operator of ONNX Runtime, no quantization. The other side of `encoder.py`."""

import json

import numpy as np
from safetensors.numpy import load_file

from workers.artifacts.graph import FLOAT, INT64, GraphWriter


class PlainBert:
    """Write what a tracing exporter makes of the model's Python code, operator by operator."""

    def __init__(self, weights, config):
        self.tensors = load_file(str(weights))
        self.config = json.loads(config.read_text(encoding="utf-8"))
        self.graph = GraphWriter("plain")

    def write(self, target):
        graph = self.graph
        ids = graph.input("input_ids", INT64, ["batch", "sequence"])
        mask = graph.input("attention_mask", INT64, ["batch", "sequence"])
        weights = graph.node("Cast", [mask], to=FLOAT)
        spread = graph.node("Unsqueeze", [weights, self.axes(1, 2)])
        away = graph.node("Mul", [graph.node("Sub", [self.number(1.0), spread]), self.number(-3.4e38)])
        hidden = self.embed(ids)
        for layer in range(self.config["num_hidden_layers"]):
            hidden = self.layer(f"encoder.layer.{layer}", hidden, away)
        column = graph.node("Unsqueeze", [weights, self.axes(-1)])
        total = graph.node("ReduceSum", [graph.node("Mul", [hidden, column]), self.axes(1)], keepdims=0)
        count = graph.node("ReduceSum", [column, self.axes(1)], keepdims=0)
        mean = graph.node("Div", [total, graph.node("Clip", [count, self.number(1e-9)])])
        length = graph.node("Clip", [graph.node("ReduceL2", [mean], axes=[1], keepdims=1), self.number(1e-12)])
        graph.node("Div", [mean, length], ["sentence_embedding"])
        graph.output("sentence_embedding", FLOAT, ["batch", self.config["hidden_size"]])
        graph.save(target)

    def embed(self, ids):
        graph = self.graph
        first, one = self.constant("first", np.array(0, np.int64)), self.constant("one", np.array(1, np.int64))
        length = graph.node("Gather", [graph.node("Shape", [ids]), one], axis=0)
        places = graph.node("Range", [first, length, one])
        words = graph.node("Gather", [self.tensor("embeddings.word_embeddings.weight"), ids])
        segment = self.constant("segment", self.tensors["embeddings.token_type_embeddings.weight"][0])
        positions = graph.node("Gather", [self.tensor("embeddings.position_embeddings.weight"), places])
        total = graph.node("Add", [graph.node("Add", [words, segment]), positions])
        return self.norm(total, "embeddings.LayerNorm")

    def layer(self, at, hidden, away):
        graph, size = self.graph, self.config["hidden_size"] // self.config["num_attention_heads"]
        parts = (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3]))
        q, k, v = (self.heads(self.dense(hidden, f"{at}.attention.self.{name}"), order) for name, order in parts)
        scores = graph.node("Div", [graph.node("MatMul", [q, k]), self.number(size**0.5)])
        chances = graph.node("Softmax", [graph.node("Add", [scores, away])], axis=-1)
        mixed = graph.node("Transpose", [graph.node("MatMul", [chances, v])], perm=[0, 2, 1, 3])
        flat = self.constant("flat", np.array([0, 0, self.config["hidden_size"]], np.int64))
        mixed = self.dense(graph.node("Reshape", [mixed, flat]), f"{at}.attention.output.dense")
        hidden = self.norm(graph.node("Add", [mixed, hidden]), f"{at}.attention.output.LayerNorm")
        wide = self.dense(hidden, f"{at}.intermediate.dense")
        erf = graph.node("Erf", [graph.node("Div", [wide, self.number(2**0.5)])])
        active = graph.node(
            "Mul", [graph.node("Mul", [wide, graph.node("Add", [erf, self.number(1.0)])]), self.number(0.5)]
        )
        fed = self.dense(active, f"{at}.output.dense")
        return self.norm(graph.node("Add", [fed, hidden]), f"{at}.output.LayerNorm")

    def heads(self, value, order):
        count = self.config["num_attention_heads"]
        shape = self.constant("heads", np.array([0, 0, count, self.config["hidden_size"] // count], np.int64))
        return self.graph.node("Transpose", [self.graph.node("Reshape", [value, shape])], perm=order)

    def dense(self, value, name):
        weight = self.constant(f"{name}.turned", self.tensors[f"{name}.weight"].T)
        return self.graph.node("Add", [self.graph.node("MatMul", [value, weight]), self.tensor(f"{name}.bias")])

    def norm(self, value, name):
        graph = self.graph
        centred = graph.node("Sub", [value, graph.node("ReduceMean", [value], axes=[-1], keepdims=1)])
        squares = graph.node("Pow", [centred, self.number(2.0)])
        spread = graph.node("ReduceMean", [squares], axes=[-1], keepdims=1)
        spread = graph.node("Sqrt", [graph.node("Add", [spread, self.number(1e-12)])])
        scaled = graph.node("Mul", [graph.node("Div", [centred, spread]), self.tensor(f"{name}.weight")])
        return graph.node("Add", [scaled, self.tensor(f"{name}.bias")])

    def tensor(self, name):
        return self.constant(name, self.tensors[name])

    def number(self, value):
        return self.constant(f"number {value}", np.array(value, np.float32))

    def axes(self, *axes):
        return self.constant(f"axes {axes}", np.array(axes, np.int64))

    def constant(self, name, value):
        return self.graph.constant(name, value)
