"""Write models as others export them to ONNX: the same weights, under the names and the other way round that exporters leave them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.workers.tiny import TinyLlama
from workers.artifacts.quantize import quantize_int4

ROPE = "rotary_emb.cos_cache"


class Export:
    """Collect the nodes of an export that hold weights. The rest of its graph is never read, and is left out."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, kind: str, name: str, inputs: list[str], **attributes: Any) -> str:
        domain = "com.microsoft" if kind in ("MatMulNBits", "SkipSimplifiedLayerNormalization") else ""
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}_out"], name=name, domain=domain, **attributes))
        return f"{name}_out"

    def save(self, path: Path, data: str | None = None) -> Path:
        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
        out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", "words"])
        graph = helper.make_graph(self.nodes, "main_graph", [ids], [out], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        onnx.save_model(model, str(path), save_as_external_data=data is not None, location=data, size_threshold=64)
        return path


def write_optimum(model: TinyLlama, folder: Path) -> Path:
    """Export as Optimum does: gains and biases keep their names, matrices are turned and numbered, all in ``model.onnx_data``."""
    model.write_folder(folder)
    (folder / "model.safetensors").unlink()
    export, weights = Export(), model.weights()

    def matmul(path: str, value: NDArray[Any]) -> None:
        number = export.constant(f"onnx::MatMul_{len(export.constants) + 400}", value.T)
        export.node("MatMul", f"{path}/MatMul", ["hidden", number])

    table = export.constant("model.embed_tokens.weight", weights["token_embd.weight"])
    export.node("Gather", "/model/embed_tokens/Gather", [table, "input_ids"])
    for layer in range(model.layers):
        at, theirs = f"blk.{layer}", f"/model/layers.{layer}"
        for norm, name in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            gain = export.constant(f"model.layers.{layer}.{name}.weight", weights[f"{at}.{norm}.weight"])
            export.node("Add", f"{theirs}/{name}/Add", [export.constant(f"{theirs}/eps_{norm}", np.float32(1e-5)), "x"])
            export.node("Mul", f"{theirs}/{name}/Mul_1", [gain, "hidden"])
        for part in "qkv":
            matmul(f"{theirs}/self_attn/{part}_proj", weights[f"{at}.attn_{part}.weight"])
            bias = weights.get(f"{at}.attn_{part}.bias")
            if bias is not None:
                name = export.constant(f"model.layers.{layer}.self_attn.{part}_proj.bias", bias)
                export.node("Add", f"{theirs}/self_attn/{part}_proj/Add", [name, "hidden"])
            gain = weights.get(f"{at}.attn_{part}_norm.weight")
            if gain is not None:
                export.node(
                    "Mul",
                    f"{theirs}/self_attn/{part}_norm/Mul_1",
                    [export.constant(f"onnx::Mul_{at}{part}", gain), "h"],
                )
        matmul(f"{theirs}/self_attn/o_proj", weights[f"{at}.attn_output.weight"])
        for part in ("gate", "up", "down"):
            matmul(f"{theirs}/mlp/{part}_proj", weights[f"{at}.ffn_{part}.weight"])
    export.node("Mul", "/model/norm/Mul_1", [export.constant("model.norm.weight", weights["output_norm.weight"]), "h"])
    if model.tied:
        turned = export.node("Transpose", "/lm_head/Transpose", ["model.embed_tokens.weight"], perm=[1, 0])
        export.node("MatMul", "/lm_head/MatMul", ["hidden", turned])
    else:
        matmul("/lm_head", weights["output.weight"])
    export.save(folder / "model.onnx", "model.onnx_data")
    return folder


class GenaiExport(Export):
    """Name things as the builder of onnxruntime-genai does."""

    def __init__(self, dtype: Any, bits: int) -> None:
        super().__init__()
        self.dtype, self.bits = dtype, bits

    def matmul(self, path: str, value: NDArray[Any]) -> None:
        name = path.strip("/").replace("/", ".")
        if not self.bits:
            turned = self.constant(f"{name}.MatMul.weight", value.T.astype(self.dtype))
            self.node("MatMul", f"{path}/MatMul", ["h", turned])
            return
        blocks = quantize_int4(value)
        assert blocks.zero_points is not None
        given = {"weight_Q4": blocks.codes, "weight_scales": blocks.scales.ravel()}
        given["weight_zero_points"] = blocks.zero_points
        names = [self.constant(f"{name}.MatMul.{kind}", part) for kind, part in given.items()]
        rows, columns = value.shape
        self.node("MatMulNBits", f"{path}/MatMul_Q4", ["h", *names], bits=4, block_size=32, N=rows, K=columns)

    def norm(self, path: str, name: str, value: NDArray[Any], first: bool = False) -> None:
        gain = self.constant(name, value.astype(self.dtype))
        kind = "SimplifiedLayerNormalization"
        self.node(kind if first else f"Skip{kind}", path, ["h", gain] if first else ["h", "x", gain])

    def attention(self, model: TinyLlama, layer: int, packed: bool) -> None:
        theirs, plain = f"/model/layers.{layer}/attn", f"model.layers.{layer}.attn"
        weights = {name.removeprefix(f"blk.{layer}.attn_"): value for name, value in model.weights().items()}
        if packed:
            self.matmul(f"{theirs}/qkv_proj", np.concatenate([weights[f"{part}.weight"] for part in "qkv"]))
        for part in "" if packed else "qkv":
            self.matmul(f"{theirs}/{part}_proj", weights[f"{part}.weight"])
            if (gain := weights.get(f"{part}_norm.weight")) is not None:
                path = f"{theirs}/{part}_norm/SimplifiedLayerNormalization"
                self.norm(path, f"{plain}.{part}_norm.layernorm.weight", gain, first=True)
        if "q.bias" in weights:
            joined = np.concatenate([weights[f"{part}.bias"] for part in "qkv"])
            self.node("Add", f"{theirs}/qkv_proj/Add", ["h", self.constant(f"{plain}.qkv_proj.Add.bias", joined)])
        self.matmul(f"{theirs}/o_proj", weights["output.weight"])


def write_genai(model: TinyLlama, folder: Path, dtype: Any = np.float32, packed: bool = False, bits: int = 0) -> Path:
    """Export as the builder of onnxruntime-genai does: its own names, fused norms, ``qkv_proj`` when ``packed``, int4 blocks."""
    model.write_folder(folder)
    (folder / "model.safetensors").unlink()
    (folder / "genai_config.json").write_text("{}")
    export, weights = GenaiExport(dtype, bits), model.weights()
    export.constant("cos_cache", np.ones((160, 32), np.float32))
    table = export.constant("model.embed_tokens.weight", weights["token_embd.weight"].astype(dtype))
    export.node("Gather", "/model/embed_tokens/Gather", [table, "input_ids"])
    for layer in range(model.layers):
        at, theirs, plain = f"blk.{layer}", f"/model/layers.{layer}", f"model.layers.{layer}"
        path = f"{theirs}/input_layernorm/{'Skip' if layer else ''}LayerNorm"
        export.norm(path, f"{plain}.input_layernorm.weight", weights[f"{at}.attn_norm.weight"], first=not layer)
        path = f"{theirs}/post_attention_layernorm/SkipLayerNorm"
        export.norm(path, f"{plain}.post_attention_layernorm.weight", weights[f"{at}.ffn_norm.weight"])
        export.attention(model, layer, packed)
        for part in ("gate", "up", "down"):
            export.matmul(f"{theirs}/mlp/{part}_proj", weights[f"{at}.ffn_{part}.weight"])
    last = f"layers.{model.layers}"
    path = f"/model/{last}/final_norm_layernorm/SkipLayerNorm"
    export.norm(path, f"model.{last}.final_norm_layernorm.weight", weights["output_norm.weight"])
    export.matmul("/lm_head", weights["token_embd.weight"] if model.tied else weights["output.weight"])
    export.save(folder / "model.onnx", "model.onnx.data")
    return folder


def _add_gemm(export: Export, name: str, weight: NDArray[Any], bias: NDArray[Any]) -> None:
    given = [export.constant(f"{name}.weight", weight), export.constant(f"{name}.bias", bias)]
    export.node("Gemm", f"/{name.replace('.', '/')}/Gemm", ["h", *given], transB=1)


def _begin_bert(folder: Path, source: Path, hidden: int, ffn: int) -> None:
    """Write what lies beside the weights: the tokenizer of ``source``, and the configuration."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    config = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "num_hidden_layers": 2,
        "hidden_size": hidden,
        "num_attention_heads": 4,
        "intermediate_size": ffn,
        "max_position_embeddings": 64,
        "vocab_size": 60,
        "layer_norm_eps": 1e-12,
        "architectures": ["BertModel"],
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_bert(
    folder: Path, source: Path, labels: int = 0, hidden: int = 32, theirs: Callable[[str], str] = str
) -> dict[str, NDArray[np.float32]]:
    """Write a random sentence encoder as torch exports it, or a classifier with so many ``labels``, with the tokenizer of ``source``;
    return its weights by BERT's names. ``theirs`` gives a weight's name in another family; an empty one: it has no such weight."""
    ffn, order = 2 * hidden, np.random.default_rng(4)
    _begin_bert(folder, source, hidden, ffn)
    export, made = Export(), {}

    def keep(name: str, *shape: int) -> NDArray[np.float32]:
        made[name] = (order.standard_normal(shape) * 0.3).astype(np.float32)
        return made[name]

    def place(name: str) -> str:
        """Return the path of a module of this name."""
        return "/" + re.sub(r"\.(?!\d)", "/", theirs(f"{name}.weight").removesuffix(".weight"))

    for kind, rows in (("word", 60), ("position", 64), ("token_type", 2)):
        name = f"embeddings.{kind}_embeddings.weight"
        if theirs(name):
            given = export.constant(theirs(name), keep(name, rows, hidden))
            export.node("Gather", f"/embeddings/{kind}_embeddings/Gather", [given, "i"])

    def norm(name: str) -> None:
        for kind, number in (("weight", "Mul"), ("bias", "Add_1")):
            given = export.constant(theirs(f"{name}.{kind}"), keep(f"{name}.{kind}", hidden))
            export.node(number[:3], f"{place(name)}/{number}", [given])

    norm("embeddings.LayerNorm")
    for layer in range(2):
        at = f"encoder.layer.{layer}"
        for part, rows, columns in (
            *((f"attention.self.{name}", hidden, hidden) for name in ("query", "key", "value")),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", ffn, hidden),
            ("output.dense", hidden, ffn),
        ):
            path = place(f"{at}.{part}")
            weight = export.constant(f"onnx::MatMul_{layer}{part}", keep(f"{at}.{part}.weight", rows, columns).T)
            export.node("MatMul", f"{path}/MatMul", ["h", weight])
            bias = export.constant(theirs(f"{at}.{part}.bias"), keep(f"{at}.{part}.bias", rows))
            export.node("Add", f"{path}/Add", [bias, "h"])
        norm(f"{at}.attention.output.LayerNorm")
        norm(f"{at}.output.LayerNorm")
    for name, rows in (("pooler.dense", hidden), ("classifier", labels)) if labels else ():
        own = theirs(f"{name}.weight").removesuffix(".weight")
        _add_gemm(export, own, keep(f"{name}.weight", rows, hidden), keep(f"{name}.bias", rows))
    export.save(folder / "model.onnx")
    return made
