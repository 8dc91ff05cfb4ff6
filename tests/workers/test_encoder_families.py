"""Encoders that are BERT but for little (RoBERTa and its kin, DistilBERT) compute what their papers say, or are refused with a reason."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from aiscale.wire.manifest import TOKENIZER_FILE, list_manifests
from tests.workers import exports
from tests.workers.plain_bert import classify, compute_states
from tests.workers.test_imports import change
from workers.artifacts import build
from workers.artifacts.errors import ArtifactError
from workers.artifacts.imports import import_model
from workers.engine.encoder import OnnxEncoder
from workers.engine.providers import CPU

FAMILIES = ["roberta", "xlm-roberta", "camembert", "distilbert"]
NAMES = {"0": "calm", "1": "angry", "2": "sad"}
TEXTS = [[5, 9, 14, 3], [40, 2], [1, 2, 3, 4, 5, 6, 7], [33] * 20, [8]]
FIRST = 2
"""RoBERTa's padding token is number 1, and positions begin behind it."""
LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def name_in(family: str, name: str) -> str:
    """Return what a weight of BERT's name is called in a family; empty: it has none."""
    if family != "distilbert":
        named = {"pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"}
        at, _, kind = name.rpartition(".")
        return f"{named[at]}.{kind}" if at in named else f"roberta.{name}"
    found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is not None:
        return f"distilbert.transformer.layer.{found[1]}.{LAYER[found[2]]}.{found[3]}"
    if "token_type" in name:
        return ""
    if name.startswith("embeddings"):
        return f"distilbert.{name}"
    return name.replace("pooler.dense", "pre_classifier")


def write(folder: Path, source: Path, family: str, labels: int) -> dict[str, Any]:
    """Write a random model of a family as an ONNX export, and as safetensors in ``plain`` beside it; return its weights by BERT's names."""
    export, plain = folder / "export", folder / "plain"
    weights = exports.write_bert(export, source, labels=labels, theirs=lambda name: name_in(family, name))
    kind = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert", "distilbert": "DistilBert"}[
        family
    ]
    said = {"architectures": [f"{kind}{'ForSequenceClassification' if labels else 'Model'}"], "model_type": family}
    if labels:
        said["id2label"] = NAMES
    change(export, "config.json", **said, layer_norm_eps=1e-12, pad_token_id=1)
    if family == "distilbert":
        config = json.loads((export / "config.json").read_text())
        for ours, theirs in (
            ("num_hidden_layers", "n_layers"),
            ("hidden_size", "dim"),
            ("num_attention_heads", "n_heads"),
        ):
            config[theirs] = config.pop(ours)
        config["activation"] = config.pop("hidden_act")
        (export / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "layer_norm_eps"}))
    plain.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (plain / name).write_bytes((export / name).read_bytes())
    named = {name_in(family, name): value for name, value in weights.items()}
    if family != "distilbert" and labels:
        named["roberta.pooler.dense.weight"] = weights["pooler.dense.weight"] * 2  # left over from training, of no use
    save_file(named, plain / "model.safetensors")
    return weights


@pytest.mark.parametrize("kind", ["plain", "export"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_numpy(tmp_path: Path, tiny_llama: Any, family: str, kind: str) -> None:
    weights = write(tmp_path, tiny_llama.write_folder(tmp_path / "hf"), family, 0)
    first = 0 if family == "distilbert" else FIRST
    made = import_model(tmp_path / "models", tmp_path / kind, "texts", "fp32")
    assert (made.manifest.kind, made.manifest.context_tokens, made.manifest.dimensions) == ("embed", 64 - first, 32)
    assert build.verify(made.directory) == made.manifest
    longest = [[7, 3] * ((64 - first) // 2)]
    for texts in (TEXTS, TEXTS[:1], longest):
        means = [compute_states(weights, text, layers=2, heads=4, first=first).mean(0) for text in texts]
        expected = np.stack([mean / np.linalg.norm(mean) for mean in means])
        encoder = OnnxEncoder(made.directory, [CPU], 1)
        np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-5)
        assert encoder.check(texts[-1]) is None and encoder.check([5] * (65 - first)) is not None
        encoder.close()


@pytest.mark.parametrize("kind", ["plain", "export"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_numpy(tmp_path: Path, tiny_llama: Any, family: str, kind: str) -> None:
    weights = write(tmp_path, tiny_llama.write_folder(tmp_path / "hf"), family, len(NAMES))
    made = import_model(tmp_path / "models", tmp_path / kind, "moods", "fp32")
    assert (made.manifest.kind, made.manifest.labels) == ("classify", tuple(NAMES.values()))
    ways: dict[str, Any] = {"first": FIRST} if family != "distilbert" else {"active": lambda x: np.maximum(x, 0)}
    expected = np.stack([classify(weights, text, layers=2, heads=4, one=True, **ways) for text in TEXTS])
    encoder = OnnxEncoder(made.directory, [CPU], 1)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)
    assert expected.std() > 0.01
    encoder.close()


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_eight_bits_are_compared_with_fp32(tmp_path: Path, tiny_llama: Any, family: str) -> None:
    write(tmp_path, tiny_llama.write_folder(tmp_path / "hf"), family, 0)
    made = import_model(tmp_path / "models", tmp_path / "plain", "texts", "int8")
    found = re.search(r"cosine to fp32 at least ([\d.]+)", made.report[1])
    assert found is not None and float(found[1]) > 0.99


@pytest.mark.parametrize("padding", [0, 3])
def test_positions_begin_behind_the_padding_token(tmp_path: Path, tiny_llama: Any, padding: int) -> None:
    weights = write(tmp_path, tiny_llama.write_folder(tmp_path / "hf"), "roberta", 0)
    change(tmp_path / "plain", "config.json", pad_token_id=padding)
    made = import_model(tmp_path / "models", tmp_path / "plain", "texts", "fp32")
    mean = compute_states(weights, TEXTS[0], layers=2, heads=4, first=padding + 1).mean(0)
    found = OnnxEncoder(made.directory, [CPU], 1).encode(TEXTS[:1])[0]
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-5)
    assert made.manifest.context_tokens == 63 - padding


def test_a_tokenizer_of_pieces_keeps_its_marks(tmp_path: Path, tiny_llama: Any) -> None:
    """XLM-RoBERTa's kind: a unigram model of pieces, with <s> and </s> round each text."""
    weights = write(tmp_path, tiny_llama.write_folder(tmp_path / "hf"), "xlm-roberta", 0)
    pieces = [
        (word, -float(at)) for at, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "▁", "▁a", "b", "ab", "c"])
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.enable_padding(pad_id=1, length=32)
    tokenizer.save(str(tmp_path / "plain" / "tokenizer.json"))
    made = import_model(tmp_path / "models", tmp_path / "plain", "texts", "fp32")
    ids = Tokenizer.from_file(str(made.directory / TOKENIZER_FILE)).encode("ab c").ids
    assert ids[0] == 0 and ids[-1] == 2 and 1 not in ids and len(ids) > 3
    mean = compute_states(weights, ids, layers=2, heads=4, first=FIRST).mean(0)
    found = OnnxEncoder(made.directory, [CPU], 1).encode([ids])[0]
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-5)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("roberta", {"hidden_act": "gelu_new"}, "exact GELU"),
    ("distilbert", {"activation": "relu"}, "exact GELU"),
    ("xlm-roberta", {"position_embedding_type": "relative_key"}, "only absolute"),
    ("roberta", {"pad_token_id": 63}, "leaves no positions"),
    ("roberta", {"pad_token_id": -5}, "leaves no positions"),
    ("roberta", {"pad_token_id": "x"}, "not an encoder's"),
    ("roberta", {"max_position_embeddings": 80}, "64 positions, and their configuration 80"),
    ("distilbert", {"dim": None}, "not an encoder's"),
    ("distilbert", {"n_layers": 3}, "no tensor"),
    ("roberta", {"architectures": ["RobertaForTokenClassification"]}, "of its family"),
    ("roberta", {"model_type": "mpnet"}, "of encoders bert, roberta, xlm-roberta, camembert, distilbert"),
]


@pytest.mark.parametrize(("family", "said", "reason"), REFUSED)
def test_what_cannot_be_is_refused(
    tmp_path: Path, tiny_llama: Any, family: str, said: dict[str, Any], reason: str
) -> None:
    write(tmp_path, tiny_llama.write_folder(tmp_path / "hf"), family, 0)
    change(tmp_path / "plain", "config.json", **said)
    with pytest.raises(ArtifactError, match=reason):
        import_model(tmp_path / "models", tmp_path / "plain", "texts", "fp32")
    assert list_manifests(tmp_path / "models") == []


@pytest.mark.parametrize(
    ("pooling", "modules", "reason"),
    [
        ({"pooling_mode_cls_token": True}, ["Transformer", "Pooling", "Normalize"], ""),
        ({"pooling_mode": "cls"}, ["Transformer", "Pooling"], ""),
        ({"pooling_mode": "max"}, ["Transformer", "Pooling"], "pools by max"),
        ({}, ["Transformer", "Pooling", "Dense"], "not computed here: Dense"),
        ({}, None, "modules.json cannot be read"),
    ],
)
def test_what_follows_the_encoder_is_done_or_refused(
    tmp_path: Path, tiny_llama: Any, pooling: dict[str, Any], modules: list[str] | None, reason: str
) -> None:
    weights = write(tmp_path, tiny_llama.write_folder(tmp_path / "hf"), "distilbert", 0)
    (tmp_path / "plain" / "1_Pooling").mkdir()
    (tmp_path / "plain" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    listed = [{"type": f"sentence_transformers.models.{kind}"} for kind in modules or ()]
    (tmp_path / "plain" / "modules.json").write_text(json.dumps(listed) if modules else "[1]")
    if reason:
        with pytest.raises(ArtifactError, match=reason):
            import_model(tmp_path / "models", tmp_path / "plain", "texts", "fp32")
        return
    made = import_model(tmp_path / "models", tmp_path / "plain", "texts", "fp32")
    state = compute_states(weights, TEXTS[0], layers=2, heads=4)[0]
    found = OnnxEncoder(made.directory, [CPU], 1).encode(TEXTS[:1])[0]
    np.testing.assert_allclose(found, state / np.linalg.norm(state), atol=1e-5)
