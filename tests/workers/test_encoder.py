"""Show that the fused encoder computes MiniLM, against a plain numpy forward pass from the very weights."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from aiscale.wire.manifest import read_manifest
from workers.artifacts import build
from workers.artifacts.fetch import fetch
from workers.engine.encoder import OnnxEncoder
from workers.engine.providers import CPU

TEXTS = [
    "A cat sits on the mat.",
    "a",
    "The weather is so lovely today that I want to walk for hours, until the sun goes down behind the hills.",
    "Ein Hund läuft schnell 漢字",
    "A kitten lies on a rug.",
]


@pytest.fixture(scope="module")
def encoder(minilm_dir: Path) -> OnnxEncoder:
    return OnnxEncoder(minilm_dir, [CPU], 0)


@pytest.fixture(scope="module")
def token_ids(minilm_dir: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(minilm_dir / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


@pytest.fixture(scope="module")
def weights(models_dir: Path) -> dict[str, NDArray[np.float32]]:
    """The source's own tensors, fetched once beside the models."""
    path = models_dir / "sources" / "model.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch(build.find_model("all-minilm-l6-v2"), path.parent)
    return dict(load_file(str(path)))


def reference(w: dict[str, Any], ids: list[int]) -> NDArray[np.float32]:
    def norm(x: Any, name: str) -> Any:
        spread = np.sqrt(((x - x.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True) + 1e-12)
        return (x - x.mean(-1, keepdims=True)) / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x: Any, name: str) -> Any:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    tables = [w[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")]
    x = norm(tables[0][ids] + tables[1][: len(ids)] + tables[2][0], "embeddings.LayerNorm")
    erf = np.vectorize(math.erf)
    for layer in range(6):
        at = f"encoder.layer.{layer}"
        parts = [dense(x, f"{at}.attention.self.{part}") for part in ("query", "key", "value")]
        q, k, v = (part.reshape(len(ids), 12, 32).swapaxes(0, 1) for part in parts)
        chances = np.exp(q @ k.swapaxes(1, 2) / np.float32(math.sqrt(32)))
        attended = (chances / chances.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(ids), 384)
        x = norm(dense(attended, f"{at}.attention.output.dense") + x, f"{at}.attention.output.LayerNorm")
        wide = dense(x, f"{at}.intermediate.dense")
        wide = (wide * (1 + erf(wide / math.sqrt(2))) / 2).astype(np.float32)
        x = norm(dense(wide, f"{at}.output.dense") + x, f"{at}.output.LayerNorm")
    mean = x.mean(0)
    return np.asarray(mean / np.linalg.norm(mean), np.float32)


def test_vectors_equal_numpy(encoder: OnnxEncoder, token_ids: list[list[int]], weights: dict[str, Any]) -> None:
    expected = np.stack([reference(weights, ids) for ids in token_ids])
    found = encoder.encode(token_ids)
    assert found.shape == (len(TEXTS), 384) and found.dtype == np.float32
    assert (found * expected).sum(1).min() > 0.99999
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)


def test_like_texts_lie_together(encoder: OnnxEncoder, token_ids: list[list[int]]) -> None:
    likeness = encoder.encode(token_ids) @ encoder.encode(token_ids).T
    assert likeness[0, 4] > 0.5 > likeness[0, 2]


def test_padding_and_batching_change_nothing(minilm_dir: Path, token_ids: list[list[int]]) -> None:
    one_by_one = OnnxEncoder(minilm_dir, [CPU], 0, max_batch=1)
    tight = OnnxEncoder(minilm_dir, [CPU], 0, max_batch=3, max_batch_tokens=20)
    many = [token_ids[at % len(token_ids)] for at in (2, 0, 1, 4, 3, 2, 1, 0, 4, 4, 3)]
    np.testing.assert_allclose(tight.encode(many), one_by_one.encode(many), atol=2e-6)


def test_batches_hold_their_bounds(minilm_dir: Path) -> None:
    encoder = OnnxEncoder(minilm_dir, [CPU], 0, max_batch=4, max_batch_tokens=64)
    lengths = [9, 3, 70, 16, 16, 16, 16, 16, 1, 2, 2, 2, 2]
    parts = list(encoder._batches([[1] * length for length in lengths]))
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    for part in parts:
        longest = max(lengths[index] for index in part)
        assert len(part) <= 4 and (len(part) * longest <= 64 or len(part) == 1)


def test_no_texts_no_vectors(encoder: OnnxEncoder) -> None:
    assert encoder.encode([]).shape == (0, 384)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ([[101, 102], []], "text 1 has 0 tokens"),
        ([[101] * 257], "takes 1 to 256"),
        ([[101, 30522]], "outside 0 to 30521"),
        ([[101, -1]], "outside 0 to 30521"),
    ],
)
def test_impossible_texts_are_refused(encoder: OnnxEncoder, batch: list[list[int]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        encoder.encode(batch)


def test_manifest_and_tokenizer(minilm_dir: Path) -> None:
    manifest = read_manifest(minilm_dir)
    assert (manifest.kind, manifest.dimensions, manifest.context_tokens) == ("embed", 384, 256)
    tokenizer = Tokenizer.from_file(str(minilm_dir / "tokenizer.json"))
    assert len(tokenizer.encode("hi").ids) == 3, "no padding"
    assert len(tokenizer.encode("hi " * 400).ids) == 402, "no truncation"
