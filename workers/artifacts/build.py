"""Make converted models exist on disk: fetch, convert, and put each into place with one rename.

``<models_dir>/<name>/<version>/`` appears complete or not at all. Work in progress lies in ``<models_dir>/.work-*``; what a
crash leaves there is swept by the next run. A file lock lets one process build at a time.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from safetensors.numpy import load_file

from aiscale.wire.manifest import GRAPH_FILE, MANIFEST_FILE, TOKENIZER_FILE, Manifest, read_manifest
from workers.artifacts import (
    bert,
    decoder,
    encoder_families,
    gguf_decoder,
    gguf_tokenizer,
    moderation,
    safetensors_decoder,
)
from workers.artifacts.calibration import read_sample
from workers.artifacts.catalog import MODELS, BundledModel
from workers.artifacts.decoder import Precision
from workers.artifacts.errors import ArtifactError, DamagedModel, UnknownModel
from workers.artifacts.fetch import fetch
from workers.artifacts.integer import needs_unsigned

REVISIONS = {"generate": 4, "embed": 3, "classify": 2}
"""Raise one with each change of that kind's converter that changes what it writes: its models get another version. They are apart
since a new version of an encoder means that every stored vector is made anew (R1)."""

_LOCK_FILE = ".lock"
_WORK_PREFIX = ".work-"
_CHUNK_BYTES = 1 << 20


def find_model(name: str, catalog: Sequence[BundledModel] = MODELS) -> BundledModel:
    """Look a name up in the catalog. Raises: UnknownModel."""
    for model in catalog:
        if model.name == name:
            return model
    raise UnknownModel(f"there is no bundled model {name!r}; there are {', '.join(model.name for model in catalog)}")


def version_of(model: BundledModel, precision: Precision | None = None) -> str:
    """Name what the converter makes of these sources: 12 hex digits. Equal sources, converter, precision and CPU's bytes, equal version."""
    chosen = precision or model.precision
    parts = [*(file.sha256 for file in model.files), str(REVISIONS[model.kind]), chosen, *name_bytes(chosen)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def name_bytes(precision: str) -> list[str]:
    """Return what a version's name says of the weights' bytes, where they are not the usual ones (`Manifest.unsigned_weights`)."""
    return ["unsigned"] if precision == "int8" and needs_unsigned() else []


def ensure(
    models_dir: Path,
    names: Sequence[str] | None = None,
    precision: Precision | None = None,
    catalog: Sequence[BundledModel] = MODELS,
) -> list[Manifest]:
    """Make the named models (None: all) exist below ``models_dir`` and return their manifests, in the order asked.

    I/O: milliseconds when they are there; else a download and up to a minute of CPU. Safe to call from many processes.
    Raises: ArtifactError.
    """
    chosen = list(catalog) if names is None else [find_model(name, catalog) for name in dict.fromkeys(names)]
    try:
        return [_ensure_one(models_dir, model, precision) for model in chosen]
    except OSError as error:
        raise ArtifactError(
            f"cannot write the models to {models_dir}: {error}; free space there or set AISCALE_MODELS_DIR"
        ) from error


def find_complete(directory: Path) -> Manifest | None:
    """Return the manifest of a model whose files are all there with the right sizes; None when something is missing.

    I/O: one small file, one stat a file.
    """
    try:
        manifest = read_manifest(directory)
        sizes = {name: (directory / name).stat().st_size for name in manifest.files}
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None
    return manifest if sizes == manifest.file_sizes_bytes else None


def verify(directory: Path) -> Manifest:
    """Hash every file of a model and compare. I/O: reads all of it. Raises: DamagedModel."""
    manifest = find_complete(directory)
    if manifest is None:
        raise DamagedModel(f"{directory} is not a complete model; run `python -m workers.artifacts ensure`")
    for name, sha256 in manifest.files.items():
        if hash_file(directory / name) != sha256:
            raise DamagedModel(f"{directory / name} is not what was converted; delete {directory} and run ensure again")
    return manifest


def _ensure_one(models_dir: Path, model: BundledModel, precision: Precision | None) -> Manifest:
    precision = _choose_precision(model, precision)
    directory = models_dir / model.name / version_of(model, precision)
    if (manifest := find_complete(directory)) is not None:
        return manifest

    def make(work: Path, made: Path) -> Manifest:
        sources = work / "sources"
        sources.mkdir()
        return _CONVERTERS[model.kind](model, fetch(model, sources), made, directory.name, precision)

    return place(models_dir, directory, make)


def place(models_dir: Path, directory: Path, make: Callable[[Path, Path], Manifest]) -> Manifest:
    """Have ``make(work, made)`` fill the folder ``made``, and rename it to ``directory``; nothing is left behind when it cannot.

    One process at a time; who waited finds what another made. I/O: what ``make`` does.
    """
    models_dir.mkdir(parents=True, exist_ok=True)
    with _lock(models_dir):
        if (manifest := find_complete(directory)) is not None:  # another process made it while we waited
            return manifest
        _sweep(models_dir)
        try:
            return _build(models_dir, directory, make)
        finally:
            _sweep(models_dir)


def _choose_precision(model: BundledModel, asked: Precision | None) -> Precision:
    """Return the precision to make: what was asked for where it makes sense, else what runs best on this machine."""
    if model.kind == "generate" and asked is not None:
        return asked
    if model.kind != "generate" and model.precision == "int8" and (asked == "fp32" or needs_unsigned()):
        return "fp32"  # unsigned bytes are exact, but not as fast as floats in batches, which is what encoders see
    return model.precision


def _build(models_dir: Path, directory: Path, make: Callable[[Path, Path], Manifest]) -> Manifest:
    work = Path(tempfile.mkdtemp(dir=models_dir, prefix=_WORK_PREFIX))
    made = work / "made"
    made.mkdir()
    manifest = make(work, made)
    _seal(made, manifest)
    directory.parent.mkdir(exist_ok=True)
    if directory.exists():  # damaged: it goes out of sight first, whole
        directory.rename(work / "damaged")
    made.rename(directory)
    _sync(directory.parent)
    return manifest


def _convert_generator(
    model: BundledModel, paths: dict[str, Path], made: Path, version: str, precision: Precision
) -> Manifest:
    source = paths[model.files[0].name]
    shape = gguf_decoder.convert(source, made / GRAPH_FILE, precision)
    vocabulary = gguf_tokenizer.convert_tokenizer(source, made / TOKENIZER_FILE)
    hashes, sizes = list_files(made)
    return Manifest(
        name=model.name,
        version=version,
        kind="generate",
        precision=precision,
        files=hashes,
        file_sizes_bytes=sizes,
        source=model.source,
        license=model.license,
        unsigned_weights=bool(name_bytes(precision)),
        vocab_size=shape.vocab_size,
        context_tokens=model.context_tokens or shape.context_tokens,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        eos_token_ids=vocabulary.eos_token_ids,
        chat_template=vocabulary.chat_template,
        bos_token=vocabulary.bos_token,
        eos_token=vocabulary.eos_token,
        batch_invariant=decoder.BATCH_INVARIANT[precision],
    )


def _convert_encoder(
    model: BundledModel, paths: dict[str, Path], made: Path, version: str, precision: Precision
) -> Manifest:
    shape = encoder_families.read_shape(safetensors_decoder.read_json(paths["config.json"]))
    bert.convert_tokenizer(paths["tokenizer.json"], made / TOKENIZER_FILE)
    context_tokens = model.context_tokens or shape.context_tokens
    sample = read_sample(made / TOKENIZER_FILE, context_tokens)
    tensors = load_file(str(paths["model.safetensors"]))
    bert.convert(tensors, shape, made, "int8" if precision == "int8" else "fp32", sample)
    hashes, sizes = list_files(made)
    return Manifest(
        name=model.name,
        version=version,
        kind="embed",
        precision=precision,
        unsigned_weights=bool(name_bytes(precision)),
        files=hashes,
        file_sizes_bytes=sizes,
        source=model.source,
        license=model.license,
        vocab_size=shape.vocab_size,
        context_tokens=context_tokens,
        dimensions=shape.hidden,
    )


def _convert_classifier(
    model: BundledModel, paths: dict[str, Path], made: Path, version: str, precision: Precision
) -> Manifest:
    network, words, bundle = (paths[file.name] for file in model.files)
    labels, thresholds = moderation.convert(network, words, bundle, made)
    hashes, sizes = list_files(made)
    return Manifest(
        name=model.name,
        version=version,
        kind="classify",
        precision=precision,
        files=hashes,
        file_sizes_bytes=sizes,
        source=model.source,
        license=model.license,
        vocab_size=0x110000,
        context_tokens=model.context_tokens,
        dimensions=len(labels),
        labels=labels,
        thresholds=thresholds,
        reads="characters",
    )


_CONVERTERS = {"generate": _convert_generator, "embed": _convert_encoder, "classify": _convert_classifier}


def list_files(made: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Return sha256 and size of every file made so far, by name."""
    paths = sorted(made.iterdir())
    return {path.name: hash_file(path) for path in paths}, {path.name: path.stat().st_size for path in paths}


def _seal(made: Path, manifest: Manifest) -> None:
    """Write the manifest last, and make all of it survive a power cut before it is renamed into sight."""
    for path in made.iterdir():
        _sync(path)
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    with (made / MANIFEST_FILE).open("wb") as file:
        file.write(encoded + b"\n")
    _sync(made / MANIFEST_FILE)
    _sync(made)


def _sweep(models_dir: Path) -> None:
    """Remove what builds left, crashed ones too. Only the holder of the lock builds, so all work found is dead."""
    for left in models_dir.glob(f"{_WORK_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _lock(models_dir: Path) -> Iterator[None]:
    """Wait until no other process builds here. The system frees the lock of a process that dies."""
    with (models_dir / _LOCK_FILE).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
