"""Take in a model that somebody has: a GGUF file, a Hugging Face folder of safetensors or of an ONNX export, or a folder that aiscale
converted elsewhere.

The source is read as data alone, by readers that run nothing of it; what is broken, or asks for more than the graph computes, is refused
with a reason before anything is put into place.
"""

import hashlib
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import onnx
import psutil

from aiscale.wire.manifest import (
    GRAPH_FILE,
    MANIFEST_FILE,
    PADDED_GRAPH_FILE,
    TOKENIZER_FILE,
    Manifest,
    list_manifests,
    read_manifest,
)
from workers.artifacts import (
    build,
    decoder,
    encoder_families,
    encoder_imports,
    gguf_decoder,
    gguf_tokenizer,
    hf_tokenizer,
    onnx_tensors,
    quality,
    safetensors_decoder,
)
from workers.artifacts.decoder import DecoderShape, Precision
from workers.artifacts.errors import ArtifactError, ConversionError, DamagedModel
from workers.artifacts.gguf_file import GgufFile, open_file
from workers.artifacts.onnx_decoder import OnnxWeights
from workers.artifacts.onnx_tensors import OnnxTensors
from workers.artifacts.plans import Plan, name_version
from workers.artifacts.safetensors_decoder import CONFIG_FILE, SafetensorsWeights
from workers.artifacts.vocabulary import Vocabulary
from workers.artifacts.weights import WEIGHTS_FILE, WeightFile
from workers.engine.sessions import refuse_overflow

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}")
_GGUF_MAGIC = b"GGUF"
_OURS = frozenset({GRAPH_FILE, PADDED_GRAPH_FILE, TOKENIZER_FILE, WEIGHTS_FILE})
_FP32_BYTES = 4
_SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Imported:
    """Say what came of an import; ``report`` has a line for each thing that its owner should know."""

    directory: Path
    manifest: Manifest
    report: tuple[str, ...]


def import_model(
    models_dir: Path, source: Path, name: str, precision: Precision | None = None, license_: str = "unknown"
) -> Imported:
    """Convert ``source`` into ``<models_dir>/<name>/<version>/``. ``precision`` None: what runs best here.

    I/O: reads the source, writes the models directory; seconds to minutes of CPU. Raises: ArtifactError, with nothing left behind.
    """
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"{name[:100]!r} is no name for a model; write small letters, digits, - and _")
    source = source.expanduser().resolve()
    try:
        run = _choose(source, name, precision, license_)
        _check_kind(models_dir, name, run.kind)
        directory = models_dir / name / run.version
        report: list[str] = []
        if (found := build.find_complete(directory)) is not None:
            return Imported(directory, found, ("it was here already",))
        manifest = build.place(models_dir, directory, lambda work, made: run.make(work, made, report))
    except OSError as error:
        raise ArtifactError(f"cannot import {source}: {error}") from error
    return Imported(directory, manifest, tuple(report))


def _choose(source: Path, name: str, precision: Precision | None, license_: str) -> Plan:
    """Look at the source and say how it is made. I/O: hashes it. Raises: ConversionError."""
    if source.is_file():
        with source.open("rb") as file:
            magic = file.read(4)
        if magic != _GGUF_MAGIC:
            raise ConversionError(
                f"{source.name} is not a GGUF file; import one, or a folder with safetensors or an ONNX model"
            )
        return _plan_decoder(_GgufSource(source), name, precision, license_, [source])
    if not source.is_dir():
        raise ConversionError(f"there is no file or folder {source}")
    if (source / MANIFEST_FILE).is_file():
        if precision is not None:
            raise ConversionError("a converted folder is taken as it is; leave --quantize out")
        return _plan_copy(source, name)
    graph = None if next(source.glob("*.safetensors"), None) is not None else onnx_tensors.find_graph(source)
    if graph is not None and not (source / CONFIG_FILE).is_file():
        raise ConversionError(
            f"{source.name} holds an ONNX graph without {CONFIG_FILE}: put the model's own beside it, which says its dimensions"
        )
    weights = OnnxTensors(graph).list_files() if graph is not None else safetensors_decoder.list_files(source)
    files = [*weights, source / CONFIG_FILE]
    files += [path for side in _SIDE_FILES if (path := source / side).is_file()]
    config = safetensors_decoder.read_json(source / CONFIG_FILE)
    if config.get("model_type") in encoder_families.FAMILIES:
        return encoder_imports.plan(source, name, precision, license_, files, config, graph)
    return _plan_decoder(_FolderSource(source, config, graph), name, precision, license_, files)


class _GgufSource:
    """Read a decoder from a GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _file(self) -> GgufFile:
        return open_file(self.path)

    def read_shape(self) -> DecoderShape:
        return gguf_decoder.read_shape(self._file)

    def write(self, shape: DecoderShape, target: Path, precision: Precision, large: WeightFile) -> None:
        gguf_decoder.write(self._file, target, precision, large)

    def write_tokenizer(self, target: Path) -> Vocabulary:
        return gguf_tokenizer.write(self._file, target)


class _FolderSource:
    """Read a decoder from a Hugging Face folder: from ``graph`` where its weights lie in an ONNX export, else from safetensors."""

    def __init__(self, path: Path, config: dict[str, Any], graph: Path | None) -> None:
        self.path = path
        self._config = config
        self._graph = graph

    def read_shape(self) -> DecoderShape:
        return safetensors_decoder.read_shape(self._config)

    def write(self, shape: DecoderShape, target: Path, precision: Precision, large: WeightFile) -> None:
        weights: decoder.Weights
        if self._graph is None:
            weights = SafetensorsWeights(self.path, self._config, shape)
        else:
            weights = OnnxWeights(self._graph, self._config, shape)
        decoder.write(weights, shape, target, precision, large)

    def write_tokenizer(self, target: Path) -> Vocabulary:
        return hf_tokenizer.convert_tokenizer(self.path, target)


def _plan_decoder(
    source: _GgufSource | _FolderSource, name: str, precision: Precision | None, license_: str, files: list[Path]
) -> Plan:
    chosen: Precision = precision or "int8"
    version = name_version(files, "generate", chosen)

    def make(work: Path, made: Path, report: list[str]) -> Manifest:
        shape = source.read_shape()
        _write_graph(source, shape, made, chosen)
        vocabulary = source.write_tokenizer(made / TOKENIZER_FILE)
        if vocabulary.size > shape.vocab_size:
            raise ConversionError(f"the tokenizer knows {vocabulary.size} tokens, and the model {shape.vocab_size}")
        hashes, sizes = build.list_files(made)
        manifest = Manifest(
            name=name,
            version=version,
            kind="generate",
            precision=chosen,
            unsigned_weights=bool(build.name_bytes(chosen)),
            files=hashes,
            file_sizes_bytes=sizes,
            source=f"{source.path.name} sha256:{build.hash_file(files[0])}",
            license=license_,
            vocab_size=shape.vocab_size,
            context_tokens=shape.context_tokens,
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            eos_token_ids=vocabulary.eos_token_ids,
            chat_template=vocabulary.chat_template,
            bos_token=vocabulary.bos_token,
            eos_token=vocabulary.eos_token,
            batch_invariant=decoder.BATCH_INVARIANT[chosen],
        )
        report += _report_decoder(source, shape, work, made, manifest)
        return manifest

    return Plan("generate", version, make)


def _write_graph(source: _GgufSource | _FolderSource, shape: DecoderShape, folder: Path, precision: Precision) -> None:
    with WeightFile(folder / WEIGHTS_FILE) as large:
        source.write(shape, folder / GRAPH_FILE, precision, large)


def _report_decoder(
    source: _GgufSource | _FolderSource, shape: DecoderShape, work: Path, made: Path, manifest: Manifest
) -> list[str]:
    """Compare with fp32, where the memory is there for it."""
    reference, lines = None, []
    weights = shape.layers * shape.hidden * (3 * shape.ffn + 2 * (shape.heads + shape.kv_heads) * shape.head_dim)
    fp32_bytes = _FP32_BYTES * (weights + 2 * shape.vocab_size * shape.hidden)
    if manifest.precision != "fp32":
        if 2 * fp32_bytes < psutil.virtual_memory().available:
            reference = work / "fp32"
            reference.mkdir()
            _write_graph(source, shape, reference, "fp32")
            size_bytes = sum(path.stat().st_size for path in reference.iterdir())
            lines.append(
                f"size: {sum(manifest.file_sizes_bytes.values()) / 1e6:.1f} MB, fp32 {size_bytes / 1e6:.1f} MB"
            )
        else:
            lines.append(f"not compared with fp32: that takes {2 * fp32_bytes / 1e9:.0f} GB of memory")
    lines += quality.measure(made, manifest, reference).describe()
    if manifest.chat_template is None:
        lines.append("it has no chat template: it serves /v1/completions, and refuses chats")
    if not manifest.batch_invariant:
        lines.append("not batch-invariant: an answer may differ in its last bits with what shares its batch")
    return lines


def _plan_copy(source: Path, name: str) -> Plan:
    """Take a folder that aiscale converted on another machine. Raises: ConversionError."""
    try:
        manifest = read_manifest(source)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConversionError(f"{MANIFEST_FILE} is not one of aiscale's: {str(error)[:150]}") from error
    if not {GRAPH_FILE, TOKENIZER_FILE} <= set(manifest.files) <= _OURS:
        raise ConversionError(f"{MANIFEST_FILE} lists other files than a model of aiscale has")
    try:
        refuse_overflow(source, msgspec.to_builtins(manifest))
    except ValueError as error:
        raise ConversionError(str(error)) from error
    version = hashlib.sha256(
        "\n".join(f"{file}:{sha}" for file, sha in sorted(manifest.files.items())).encode()
    ).hexdigest()[:12]

    def make(work: Path, made: Path, report: list[str]) -> Manifest:
        try:
            build.verify(source)
        except DamagedModel as error:
            raise ConversionError(
                f"{source.name} is not what its {MANIFEST_FILE} says: a file is missing or was changed"
            ) from error
        for file in manifest.files:
            shutil.copyfile(source / file, made / file)
        for file in manifest.files:
            if file.endswith(".onnx"):
                _check_graph(made / file)
        renamed = msgspec.structs.replace(manifest, name=name, version=version)
        if manifest.kind == "generate":
            report += quality.measure(made, renamed).describe()
        return renamed

    return Plan(manifest.kind, version, make)


def _check_graph(path: Path) -> None:
    """Refuse a graph that reaches out of its folder, or needs operators that nobody here has. Raises: ConversionError."""
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own
        raise ConversionError(f"{path.name} is not an ONNX graph: {str(error)[:150]}") from error
    domains = {opset.domain for opset in model.opset_import} - {"", "ai.onnx", "com.microsoft"}
    if domains or model.functions:
        raise ConversionError(
            f"{path.name} needs operators of {', '.join(sorted(domains)) or 'its own'}, which are not served"
        )
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value != WEIGHTS_FILE:
                raise ConversionError(
                    f"{path.name} reads its weights from {entry.value[:100]!r}, outside its folder's own files"
                )


def _check_kind(models_dir: Path, name: str, kind: str) -> None:
    for _, manifest in list_manifests(models_dir):
        if manifest.name == name and manifest.kind != kind:
            raise ConversionError(f"there is a model {name} of another kind ({manifest.kind}); choose another name")
