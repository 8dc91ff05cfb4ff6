"""Classifiers of whole texts are imported as what they are, or refused with a reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from aiscale.wire.manifest import list_manifests
from tests.workers import exports
from tests.workers.plain_bert import classify
from tests.workers.test_imports import change
from workers.artifacts import build
from workers.artifacts.errors import ArtifactError
from workers.artifacts.imports import import_model
from workers.engine.encoder import OnnxEncoder
from workers.engine.providers import CPU

NAMES = {"0": "calm", "1": "angry", "2": "sad"}
TEXTS = [[5, 9, 14, 3], [40, 2], [1, 2, 3, 4, 5, 6, 7], [33] * 20, [8]]


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Any) -> Path:
    """A classifier as a folder of an ONNX export; ``plain`` beside it holds it as safetensors."""
    export, plain = tmp_path / "export", tmp_path / "plain"
    weights = exports.write_bert(export, tiny_llama.write_folder(tmp_path / "hf"), labels=len(NAMES))
    change(export, "config.json", architectures=["BertForSequenceClassification"], id2label=NAMES)
    plain.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (plain / name).write_bytes((export / name).read_bytes())
    named = {name if name.startswith("classifier") else f"bert.{name}": value for name, value in weights.items()}
    save_file(named, plain / "model.safetensors")
    np.savez(tmp_path / "weights.npz", **weights)  # type: ignore[arg-type]
    return tmp_path


@pytest.mark.parametrize("kind", ["export", "plain"])
@pytest.mark.parametrize("problem", [None, "single_label_classification", "multi_label_classification"])
def test_a_classifier_scores_as_numpy_does(folder: Path, kind: str, problem: str | None) -> None:
    change(folder / kind, "config.json", problem_type=problem)
    made = import_model(folder / "models", folder / kind, "moods", "fp32")
    assert (made.manifest.kind, made.manifest.labels, made.manifest.dimensions) == (
        "classify",
        tuple(NAMES.values()),
        3,
    )
    assert made.manifest.thresholds == (0.5,) * 3 and made.manifest.reads == "tokens"
    assert build.verify(made.directory) == made.manifest
    weights = dict(np.load(folder / "weights.npz"))
    one = problem != "multi_label_classification"
    expected = np.stack([classify(weights, text, layers=2, heads=4, one=one) for text in TEXTS])
    encoder = OnnxEncoder(made.directory, [CPU], 1)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS[:1]), expected[:1], atol=1e-5)
    encoder.close()


def test_eight_bits_are_compared_with_fp32(folder: Path) -> None:
    made, wide = (
        import_model(folder / "models", folder / "plain", "moods", precision) for precision in ("int8", "fp32")
    )  # type: ignore[arg-type]
    size, quality = made.report
    assert size.startswith("size: ") and "the likeliest label is fp32's for 100.0%" in quality
    narrow, exact = (OnnxEncoder(each.directory, [CPU], 1).encode(TEXTS) for each in (made, wide))
    np.testing.assert_allclose(narrow, exact, atol=0.02)
    assert made.manifest.version != wide.manifest.version and wide.report == ()


def test_one_label_is_a_chance_of_its_own(folder: Path) -> None:
    weights = dict(np.load(folder / "weights.npz"))
    weights["classifier.weight"], weights["classifier.bias"] = weights["classifier.weight"][:1], np.zeros(1, np.float32)
    save_file(weights, folder / "plain" / "model.safetensors")
    change(folder / "plain", "config.json", id2label={"0": "relevant"})
    made = import_model(folder / "models", folder / "plain", "relevance", "fp32")
    scores = OnnxEncoder(made.directory, [CPU], 1).encode(TEXTS)
    expected = np.stack([classify(weights, text, layers=2, heads=4, one=False) for text in TEXTS])
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scores.std() > 0.001


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"id2label": {"0": "a", "1": "b"}}, "tells 3 labels apart"),
    ({"id2label": {"0": "a", "1": "a", "2": "b"}}, "each once"),
    ({"id2label": {"0": "a", "1": "b", "3": "c"}}, "gaps"),
    ({"id2label": {"0": "a", "1": "", "2": "c"}}, "in words"),
    ({"id2label": {"0": "a", "1": 7, "2": "c"}}, "in words"),
    ({"id2label": {"zero": "a"}}, "cannot be read"),
    ({"id2label": ["a"]}, "cannot be read"),
    ({"id2label": {}}, "1 to 1000 labels"),
    ({"problem_type": "regression"}, "no chances"),
    ({"architectures": ["BertForTokenClassification"]}, "classifiers of whole texts"),
]


@pytest.mark.parametrize(("said", "reason"), REFUSED)
def test_what_cannot_be_is_refused(folder: Path, said: dict[str, Any], reason: str) -> None:
    change(folder / "plain", "config.json", **said)
    with pytest.raises(ArtifactError, match=reason):
        import_model(folder / "models", folder / "plain", "moods", "fp32")
    assert list_manifests(folder / "models") == []


def test_a_classifier_without_its_head_is_refused(folder: Path) -> None:
    weights = dict(np.load(folder / "weights.npz"))
    del weights["pooler.dense.bias"]
    save_file(weights, folder / "plain" / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"pooler\.dense\.bias"):
        import_model(folder / "models", folder / "plain", "moods", "fp32")
    assert json.loads((folder / "plain" / "config.json").read_text())["id2label"] == NAMES
