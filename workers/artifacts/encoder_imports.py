"""Plan the import of an encoder of BERT's kind from a Hugging Face folder: a sentence encoder, or a classifier of whole texts."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from aiscale.wire.manifest import GRAPH_FILE, TOKENIZER_FILE, Manifest
from workers.artifacts import bert, build, encoder_families, hf_tokenizer, quality, safetensors_decoder
from workers.artifacts.bert import BertShape
from workers.artifacts.calibration import read_sample
from workers.artifacts.decoder import Precision
from workers.artifacts.errors import ConversionError
from workers.artifacts.integer import needs_unsigned
from workers.artifacts.onnx_tensors import OnnxTensors
from workers.artifacts.plans import Plan, name_version
from workers.artifacts.safetensors_decoder import CONFIG_FILE

MOST_LABELS, MOST_LABEL_CHARS = 1000, 100
THRESHOLD = 0.5
"""From this score on a label of an imported classifier holds."""


def plan(
    source: Path,
    name: str,
    precision: Precision | None,
    license_: str,
    files: list[Path],
    config: dict[str, Any],
    graph: Path | None,
) -> Plan:
    """Say how the folder ``source`` is converted: its tensors from ``graph``, where they lie in an ONNX export. I/O: hashes ``files``.
    Raises: ConversionError."""
    kinds = [str(kind) for kind in config.get("architectures") or ()]
    classifies = any("ForSequenceClassification" in kind for kind in kinds)
    if any("For" in kind and "ForSequenceClassification" not in kind and "ForMaskedLM" not in kind for kind in kinds):
        raise ConversionError(
            f"{source.name} holds a {kinds[0][:60]}; of its family, sentence encoders and classifiers of whole texts are imported"
        )
    if precision not in (None, "int8", "fp32"):
        raise ConversionError(f"encoders and classifiers are converted to int8 or fp32, not to {precision}")
    # where bytes must be unsigned to be exact, floats are faster in batches
    chosen: bert.Precision = precision or ("fp32" if needs_unsigned() else "int8")
    kind: Literal["embed", "classify"] = "classify" if classifies else "embed"
    version = name_version(files, kind, chosen)

    def make(work: Path, made: Path, report: list[str]) -> Manifest:
        if classifies:
            shape = encoder_families.read_shape(config, labels=_read_labels(config), scores=_read_scores(config))
        else:
            shape = encoder_families.read_shape(config, _read_pooling(source))
        hf_tokenizer.copy_tokenizer(source, made / TOKENIZER_FILE)
        sample = read_sample(made / TOKENIZER_FILE, shape.context_tokens)
        tensors = encoder_families.rename(_read_tensors(source, graph), config)
        _convert(tensors, shape, made, chosen, sample)
        hashes, sizes = build.list_files(made)
        report += _report(tensors, shape, work, made, chosen, sample)
        return Manifest(
            name=name,
            version=version,
            kind=kind,
            precision=chosen,
            unsigned_weights=bool(build.name_bytes(chosen)),
            files=hashes,
            file_sizes_bytes=sizes,
            source=f"{source.name} sha256:{build.hash_file(files[0])}",
            license=license_,
            vocab_size=shape.vocab_size,
            context_tokens=shape.context_tokens,
            dimensions=len(shape.labels) or shape.hidden,
            labels=shape.labels,
            thresholds=(THRESHOLD,) * len(shape.labels),
        )

    return Plan(kind, version, make)


def _read_tensors(source: Path, graph: Path | None) -> dict[str, Any]:
    try:
        if graph is not None:
            return dict(OnnxTensors(graph).read_all())
        paths = safetensors_decoder.list_files(source)
        return {key: value for path in paths for key, value in load_file(str(path)).items()}
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ConversionError(f"the folder's tensors cannot be read: {str(error)[:150]}") from error


def _convert(
    tensors: dict[str, Any], shape: BertShape, target: Path, precision: bert.Precision, sample: list[list[int]]
) -> None:
    try:
        bert.convert(tensors, shape, target, precision, sample)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ConversionError(f"the folder's tensors are not those of its configuration: {str(error)[:150]}") from error


def _report(
    tensors: dict[str, Any],
    shape: BertShape,
    work: Path,
    made: Path,
    precision: bert.Precision,
    sample: list[list[int]],
) -> list[str]:
    """Compare with fp32. I/O: seconds of CPU, another graph in ``work``. Raises: ConversionError for a graph that cannot run."""
    if precision == "fp32":
        quality.run_encoder(made / GRAPH_FILE, sample[:1])
        return []
    reference = work / "fp32"
    reference.mkdir()
    _convert(tensors, shape, reference, "fp32", sample)
    narrow, wide = (sum(path.stat().st_size for path in folder.iterdir()) for folder in (made, reference))
    rows, expected = (quality.run_encoder(folder / GRAPH_FILE, sample) for folder in (made, reference))
    lines = [f"size: {narrow / 1e6:.1f} MB, fp32 {wide / 1e6:.1f} MB"]
    if shape.labels:
        same = float((rows.argmax(axis=1) == expected.argmax(axis=1)).mean())
        most = float(np.abs(rows - expected).max())
        lines.append(
            f"quality: the likeliest label is fp32's for {same:.1%} of {len(rows)} texts; scores differ by {most:.3f} at the most"
        )
        return lines
    cosines = quality.compare_directions(rows, expected)
    lines.append(
        f"quality: cosine to fp32 at least {cosines.min():.4f}, {cosines.mean():.4f} on average, over {len(rows)} texts"
    )
    if cosines.min() < quality.LEAST_COSINE:
        lines.append(
            f"that is below {quality.LEAST_COSINE}: where vectors must be as good as fp32's, take --quantize fp32"
        )
    return lines


def _read_labels(config: dict[str, Any]) -> tuple[str, ...]:
    """Return a classifier's labels, by their numbers. Raises: ConversionError."""
    said = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    try:
        numbered = sorted((int(number), label) for number, label in said.items())
    except (AttributeError, ValueError, TypeError) as error:
        raise ConversionError(f"{CONFIG_FILE} names its labels in a way that cannot be read (id2label)") from error
    labels = tuple(label for _, label in numbered)
    good = all(isinstance(label, str) and 0 < len(label.strip()) <= MOST_LABEL_CHARS for label in labels)
    if not good or not 1 <= len(labels) <= MOST_LABELS or len(set(labels)) != len(labels):
        raise ConversionError(f"{CONFIG_FILE} must name 1 to {MOST_LABELS} labels (id2label), each once and in words")
    if [number for number, _ in numbered] != list(range(len(labels))):
        raise ConversionError(f"{CONFIG_FILE} numbers its labels with gaps (id2label)")
    return labels


def _read_scores(config: dict[str, Any]) -> Literal["one", "each"]:
    """Say whether one label holds, or each by itself. Raises: ConversionError for what gives no chances."""
    said = config.get("problem_type")
    if said not in (None, "single_label_classification", "multi_label_classification"):
        raise ConversionError(f"the model solves a {str(said)[:40]!r} problem; its numbers are no chances of labels")
    labels = config.get("id2label")
    alone = isinstance(labels, dict) and len(labels) == 1
    return "each" if said == "multi_label_classification" or alone else "one"


def _read_pooling(source: Path) -> Literal["mean", "cls"]:
    """Say how a sentence-transformers folder makes one vector of many. I/O: one small file. Raises: ConversionError."""
    _check_modules(source)
    path = source / "1_Pooling" / CONFIG_FILE
    said = safetensors_decoder.read_json(path) if path.is_file() else {}
    ways = [name.removeprefix("pooling_mode_") for name, on in said.items() if name.startswith("pooling_mode_") and on]
    if "pooling_mode" in said:
        ways.append(said["pooling_mode"])
    if ways in ([], ["mean_tokens"], ["mean"]):
        return "mean"
    if ways in (["cls_token"], ["cls"]):
        return "cls"
    raise ConversionError(
        f"the model pools by {', '.join(map(str, ways))[:100]}; mean_tokens and cls_token are computed"
    )


def _check_modules(source: Path) -> None:
    """Refuse a sentence-transformers folder with further parts, which are not computed. I/O: one small file. Raises: ConversionError."""
    path = source / "modules.json"
    if not path.is_file():
        return
    try:
        kinds = [str(module["type"]).rpartition(".")[2] for module in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConversionError(f"{path.name} cannot be read: {str(error)[:100]}") from error
    others = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if others:
        raise ConversionError(f"the model has a part that is not computed here: {', '.join(others)[:100]}")
