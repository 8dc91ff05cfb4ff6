"""Convert the two classifiers of `/v1/moderations`, each from what its package ships, into one model.

Toxicity (tox-block): a bidirectional LSTM over words, Keras HDF5, to ONNX. Attacks on prompts (securevector-guardian): TF-IDF of words and
characters with a logistic regression, JSON, to arrays. `workers.engine.moderation` computes both.
"""

import gzip
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from workers.artifacts.errors import ConversionError
from workers.artifacts.graph import FLOAT, INT64, GraphWriter
from workers.artifacts.pickled_words import read_words

TOXICITY_LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
_TOXICITY_THRESHOLD = 0.5
_TOXICITY_RANGES = (
    (0.002116, 0.999858),
    (0.000011, 0.648682),
    (0.000347, 0.997533),
    (0.000040, 0.918887),
    (0.000373, 0.986303),
    (0.000074, 0.901117),
)
"""The least and the largest chance that the network gives to each label, as its authors state them: scores are scaled to these."""

_ATTACK_THRESHOLD = 0.85
"""Higher than the authors' own: it halves the harmless questions that are taken for attacks, and finds as many jailbreaks
(`make bench-moderation`)."""
_BUNDLE_LIMIT_BYTES = 256 << 20
_GATES = (0, 3, 1, 2)
"""ONNX orders an LSTM's gates input, output, forget, cell; Keras input, forget, cell, output."""


def convert(network: Path, words: Path, bundle: Path, made: Path) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Write both classifiers into the folder ``made``; return the labels and, for each, the score from which on it holds.

    I/O: reads the sources, some seconds of CPU. Raises: ConversionError.
    """
    vocabulary = read_words(words)
    _convert_toxicity(network, made / "toxicity.onnx")
    attacks, threshold, settings = _convert_attacks(bundle, made / "attacks.npz")
    settings |= {
        "words": vocabulary.words,
        "separators": vocabulary.separators,
        "longest": vocabulary.longest,
        "ranges": _TOXICITY_RANGES,
    }
    (made / "moderation.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    threshold = max(threshold, _ATTACK_THRESHOLD)
    labels = (*TOXICITY_LABELS, *attacks)
    return labels, (*[_TOXICITY_THRESHOLD] * len(TOXICITY_LABELS), *[threshold] * len(attacks))


def _convert_toxicity(network: Path, target: Path) -> None:
    """Write ``word_ids`` int64 ``[batch, sequence]`` to ``scores`` float32 ``[batch, 6]``."""
    try:
        with h5py.File(network, "r") as file:
            layers = json.loads(file.attrs["model_config"])["config"]["layers"]
            _check_layers(layers)
            weights = {name: _read(file["model_weights"], name) for name in _PLACES}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ConversionError(f"{network.name} is not the network that was expected: {error!r}") from error
    graph = GraphWriter("toxicity")
    ids = graph.input("word_ids", INT64, ["batch", "sequence"])
    embedded = graph.node("Gather", [graph.constant("embedding", weights["embedding"]), ids], axis=0)
    sequences = graph.node("Transpose", [embedded], perm=[1, 0, 2])
    units = weights["forward.recurrent"].shape[0]
    recurrent = graph.node("LSTM", [sequences, *_lstm_weights(graph, weights)], hidden_size=units, **_LSTM)
    both = graph.node("Transpose", [recurrent], perm=[2, 0, 1, 3])  # [batch, sequence, direction, units]
    highest = graph.node("ReduceMax", [both], axes=[1], keepdims=0)
    flat = graph.node("Reshape", [highest, graph.constant("flat", np.array([0, 2 * units], np.int64))])
    hidden = graph.node("Relu", [_dense(graph, weights, "dense", flat)])
    graph.node("Sigmoid", [_dense(graph, weights, "scores", hidden)], ["scores"])
    graph.output("scores", FLOAT, ["batch", len(TOXICITY_LABELS)])
    graph.save(target)


_LSTM: dict[str, Any] = {
    "direction": "bidirectional",
    "activations": ["HardSigmoid", "Tanh", "Tanh"] * 2,
    "activation_alpha": [0.2, 0.2],
    "activation_beta": [0.5, 0.5],
}
_PLACES = {
    "embedding": "embedding/embedding/embeddings:0",
    **{
        f"{side}.{short}": f"bidirectional/bidirectional/{side}_lstm/{long}:0"
        for side in ("forward", "backward")
        for short, long in (("kernel", "kernel"), ("recurrent", "recurrent_kernel"), ("bias", "bias"))
    },
    "dense.kernel": "dense/dense/kernel:0",
    "dense.bias": "dense/dense/bias:0",
    "scores.kernel": "dense_1/dense_1/kernel:0",
    "scores.bias": "dense_1/dense_1/bias:0",
}


def _check_layers(layers: Sequence[dict[str, Any]]) -> None:
    """Raises: ConversionError for a network that the graph does not compute."""
    kinds = [layer["class_name"] for layer in layers if layer["class_name"] not in ("InputLayer", "Dropout")]
    gates: dict[str, Any] = next(
        (one["config"]["layer"]["config"] for one in layers if one["class_name"] == "Bidirectional"), {}
    )
    wanted = ["Embedding", "Bidirectional", "GlobalMaxPooling1D", "Dense", "Dense"]
    if kinds != wanted or (gates["activation"], gates["recurrent_activation"]) != ("tanh", "hard_sigmoid"):
        raise ConversionError(f"the network's layers are {kinds}; expected are {wanted} with hard_sigmoid gates")


def _read(group: Any, name: str) -> NDArray[np.float32]:
    return np.asarray(group[_PLACES[name]][()], np.float32)


def _lstm_weights(graph: GraphWriter, weights: dict[str, NDArray[np.float32]]) -> list[str]:
    def turn(kind: str) -> NDArray[np.float32]:
        sides = []
        for side in ("forward", "backward"):
            gates = np.split(weights[f"{side}.{kind}"].T, 4)
            sides.append(np.concatenate([gates[place] for place in _GATES]))
        return np.stack(sides)

    bias = turn("bias")
    bias = np.concatenate([bias, np.zeros_like(bias)], axis=1)
    parts = {"input": turn("kernel"), "recurrent": turn("recurrent"), "bias": bias}
    return [graph.constant(f"lstm.{name}", value) for name, value in parts.items()]


def _dense(graph: GraphWriter, weights: dict[str, NDArray[np.float32]], name: str, value: str) -> str:
    kernel, bias = (graph.constant(f"{name}.{kind}", weights[f"{name}.{kind}"]) for kind in ("kernel", "bias"))
    return graph.node("Gemm", [value, kernel, bias])


def _convert_attacks(bundle: Path, target: Path) -> tuple[tuple[str, ...], float, dict[str, Any]]:
    """Write the regression's arrays to ``target``; return the classes that are no benign one, the threshold, and the terms."""
    try:
        said = json.loads(_unzip(bundle))
        if said["format"] != "svguardian-pure-1":
            raise ConversionError(f"{bundle.name} is of the format {said['format']!r}, which is not known")
        coefficients = np.asarray(said["coef"], np.float32).T
        parts = {kind: _terms(said[kind]) for kind in ("word", "char")}
        columns = sum(len(terms) for terms, _ in parts.values())
        threshold = float(said["threshold"])
        if coefficients.shape != (columns, len(said["classes"])) or not 0 < threshold < 1:
            raise ConversionError(f"the numbers of {bundle.name} do not fit together")
        np.savez(
            target,
            coefficients=coefficients,
            intercept=np.asarray(said["intercept"], np.float32),
            idf=np.concatenate([idf for _, idf in parts.values()]),
        )
        settings = {
            "classes": said["classes"],
            "benign": said["classes"].index(said["benign"]),
            "window_threshold": float(said["window_min_score"]),
            "terms": {
                kind: {"terms": terms, "ngrams": [int(n) for n in said[kind]["ngram_range"]]}
                for kind, (terms, _) in parts.items()
            },
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(f"{bundle.name} is not the classifier that was expected: {error!r}") from error
    attacks = tuple(name for name in said["classes"] if name != said["benign"])
    return attacks, threshold, settings


def _unzip(bundle: Path) -> bytes:
    """Raises: ConversionError for a file that is damaged, or that unpacks to more than it may."""
    try:
        with gzip.open(bundle) as file:
            data = file.read(_BUNDLE_LIMIT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ConversionError(f"{bundle.name} cannot be unpacked: {error}") from error
    if len(data) > _BUNDLE_LIMIT_BYTES:
        raise ConversionError(f"{bundle.name} unpacks to more than {_BUNDLE_LIMIT_BYTES >> 20} MiB")
    return data


def _terms(block: dict[str, Any]) -> tuple[list[str], NDArray[np.float32]]:
    """Return a block's terms in the order of their columns, and the weight of each."""
    terms = sorted(block["vocab"], key=block["vocab"].__getitem__)
    idf = np.asarray(block["idf"], np.float32)
    if len(terms) != len(idf) or not block["sublinear_tf"] or not math.isfinite(float(idf.sum())):
        raise ValueError("terms and weights do not fit together")
    return terms, idf
