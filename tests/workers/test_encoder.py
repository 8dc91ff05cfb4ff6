"""Show that the fused encoder computes MiniLM, against a plain numpy forward pass from the very weights."""

import json
import logging
import math
import re
import textwrap
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from aiscale.wire.manifest import MANIFEST_FILE, read_manifest
from tests.workers.plain_bert import compute_states
from workers.artifacts import build
from workers.artifacts.fetch import fetch
from workers.engine.encoder import FEW_TOKENS, OnnxEncoder
from workers.engine.providers import CPU
from workers.engine.sessions import INTEGER_GRAPH, integers_add_up

TEXTS = [
    "A cat sits on the mat.",
    "a",
    "The weather is so lovely today that I want to walk for hours, until the sun goes down behind the hills.",
    "Ein Hund läuft schnell 漢字",
    "A kitten lies on a rug.",
]


@pytest.fixture(scope="module")
def float_dir(models_dir: Path) -> Path:
    model = build.find_model("all-minilm-l6-v2")
    [manifest] = build.ensure(models_dir, [model.name], "fp32")
    return models_dir / model.name / manifest.version


@pytest.fixture(scope="module")
def encoder(float_dir: Path) -> OnnxEncoder:
    return OnnxEncoder(float_dir, [CPU], 0)


@pytest.fixture(scope="module")
def small_encoder(minilm_dir: Path) -> OnnxEncoder:
    """What is served: eight bits where the CPU adds them up exactly."""
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
    mean = compute_states(w, ids, layers=6, heads=12).mean(0)
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


def test_served_vectors_point_where_the_floats_do(
    small_encoder: OnnxEncoder, encoder: OnnxEncoder, minilm_dir: Path, weights: dict[str, Any]
) -> None:
    """The acceptance of int8: cosine of at least 0.999 to float32 arithmetic, on texts that calibration has not seen."""
    tokenizer = Tokenizer.from_file(str(minilm_dir / "tokenizer.json"))
    stories = [line for doc in (math, json, threading, logging) for line in (doc.__doc__ or "").split("\n") if line]
    ids = [encoding.ids[:256] for encoding in tokenizer.encode_batch([*TEXTS, *stories, *_make_words(60)])]
    cosines = np.array([float(small_encoder.encode([text])[0] @ encoder.encode([text])[0]) for text in ids])
    print(f"cosine over {len(ids)} texts: least {cosines.min():.5f}, mean {cosines.mean():.5f}")
    assert cosines.min() >= 0.999
    expected = np.stack([reference(weights, text) for text in ids[: len(TEXTS)]])
    found = np.concatenate([small_encoder.encode([text]) for text in ids[: len(TEXTS)]])
    assert (found * expected).sum(1).min() >= 0.999


def _make_words(count: int) -> list[str]:
    """Make texts of random words, of one to sixty."""
    order = np.random.default_rng(5)
    words = re.findall("[A-Za-z]{3,}", Path(textwrap.__file__).read_text(encoding="utf-8"))
    return [" ".join(words[i] for i in order.integers(len(words), size=order.integers(1, 60))) for _ in range(count)]


@pytest.mark.parametrize("which", ["encoder", "small_encoder"])
def test_padding_and_batching_change_nothing(
    which: str, request: pytest.FixtureRequest, token_ids: list[list[int]]
) -> None:
    """A text's vector does not hang on what shares its batch: not by more than the last bits of float32."""
    encoder = request.getfixturevalue(which)
    many = [token_ids[at % len(token_ids)] for at in (2, 0, 1, 4, 3, 2, 1, 0, 4, 4, 3)]
    alone = np.concatenate([encoder.encode([text]) for text in many])
    np.testing.assert_allclose(encoder.encode(many), alone, atol=5e-6 if which == "encoder" else 2e-3)
    even = [token_ids[0]] * 5
    np.testing.assert_allclose(encoder.encode(even), np.stack([alone[1]] * 5), atol=5e-6)


def test_small_and_large_batches_give_the_same_vectors(small_encoder: OnnxEncoder, token_ids: list[list[int]]) -> None:
    """Small ones are one run, large ones several at once."""
    text = token_ids[2]
    many = FEW_TOKENS // len(text) + 1
    alone, together = small_encoder.encode([text]), small_encoder.encode([text] * many)
    assert many * len(text) > FEW_TOKENS >= len(text)
    np.testing.assert_allclose(together, np.repeat(alone, many, axis=0), atol=1e-6)


def test_no_texts_no_vectors(encoder: OnnxEncoder) -> None:
    assert encoder.encode([]).shape == (0, 384)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ([[101, 102], []], "has 0 tokens"),
        ([[101] * 257], "takes 1 to 256"),
        ([[101, 30522]], "outside 0 to 30521"),
        ([[101, -1]], "outside 0 to 30521"),
    ],
)
def test_impossible_texts_are_named(encoder: OnnxEncoder, batch: list[list[int]], sentence: str) -> None:
    problems = [problem for text in batch if (problem := encoder.check(text))]
    assert len(problems) == 1 and sentence in problems[0]
    assert encoder.check([101, 102]) is None


def test_the_overflow_probe_is_what_it_says() -> None:
    from onnx import TensorProto, helper

    sides = (("left", TensorProto.UINT8, ["m", "k"]), ("right", TensorProto.INT8, ["k", "n"]))
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["left", "right"], ["product"])],
        "m",
        [helper.make_tensor_value_info(*side) for side in sides],
        [helper.make_tensor_value_info("product", TensorProto.INT32, ["m", "n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    assert model.SerializeToString() == INTEGER_GRAPH
    assert isinstance(integers_add_up(), bool)


def test_weights_of_another_cpu_are_refused_where_their_sums_overflow(
    minilm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.engine.sessions.integers_add_up", lambda: False)
    for path in minilm_dir.iterdir():
        (tmp_path / path.name).symlink_to(path)
    manifest = read_manifest(minilm_dir)
    own = tmp_path / MANIFEST_FILE
    for foreign in (
        msgspec.structs.replace(manifest, precision="int8", unsigned_weights=signs) for signs in (False, True)
    ):
        own.unlink()
        own.write_bytes(msgspec.json.encode(foreign))
        if foreign.unsigned_weights:
            assert OnnxEncoder(tmp_path, [CPU], 0).dimensions == 384
        else:
            with pytest.raises(ValueError, match="convert it here"):
                OnnxEncoder(tmp_path, [CPU], 0)


def test_manifest_and_tokenizer(minilm_dir: Path) -> None:
    manifest = read_manifest(minilm_dir)
    assert (manifest.kind, manifest.dimensions, manifest.context_tokens) == ("embed", 384, 256)
    tokenizer = Tokenizer.from_file(str(minilm_dir / "tokenizer.json"))
    assert len(tokenizer.encode("hi").ids) == 3, "no padding"
    assert len(tokenizer.encode("hi " * 400).ids) == 402, "no truncation"
