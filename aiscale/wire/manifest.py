"""Describe one converted model on disk: ``<models_dir>/<name>/<version>/manifest.json``.

The worker reads it to load the graph, the web reads it to tokenize, to fill the chat template and to know limits.
"""

from pathlib import Path
from typing import Literal

import msgspec

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
GRAPH_FILE = "model.onnx"
PADDED_GRAPH_FILE = "model.padded.onnx"
"""Of encoders: the graph for batches of texts of different lengths. `GRAPH_FILE` takes equal ones alone."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """State what a model directory holds. ``version`` names the content: other bytes, another version."""

    schema: int = 1
    name: str
    version: str
    kind: Literal["generate", "embed", "classify"]
    precision: Literal["fp32", "fp16", "int8", "int4"]
    unsigned_weights: bool = False
    """Of int8: made to compute exactly on every CPU, by weights with 128 added or activations in smaller digits
    (`workers.artifacts.integer`). One without is exact only where `workers.engine.sessions.integers_add_up`, and faster there."""
    files: dict[str, str]
    """File name -> sha256 in hex of every file of the model, the manifest itself left out."""
    file_sizes_bytes: dict[str, int] = {}
    """File name -> size of the same files: a start checks these, and leaves hashing to `verify`."""
    source: str
    """Where the weights came from, for people: package, version, file and sha256."""
    license: str
    vocab_size: int
    context_tokens: int
    """The most tokens the model was trained to see, prompt and completion together."""
    # generation only
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    eos_token_ids: tuple[int, ...] = ()
    batch_invariant: bool = False
    """A sequence's logits are the same to the bit whatever shares its batch, so that answers can be cached exactly."""
    chat_template: str | None = None
    """Jinja source in the Hugging Face convention: ``messages``, ``add_generation_prompt``, ``bos_token``, ``eos_token``."""
    bos_token: str = ""
    eos_token: str = ""
    # embeddings: the length of a vector; classifiers: the number of labels
    dimensions: int = 0
    # classifiers only
    labels: tuple[str, ...] = ()
    thresholds: tuple[float, ...] = ()
    """From which score on each label holds."""
    reads: Literal["tokens", "characters"] = "tokens"
    """What a text is sent as: the ids of its own tokenizer, or the code points of its characters."""


def read_manifest(directory: Path) -> Manifest:
    """Read and type a model directory's manifest.

    I/O: one small file. Raises: FileNotFoundError; msgspec.ValidationError for a manifest of another shape.
    """
    return msgspec.json.decode((directory / MANIFEST_FILE).read_bytes(), type=Manifest)


def list_manifests(models_dir: Path) -> list[tuple[Path, Manifest]]:
    """List every complete model below ``models_dir`` with its directory, by name and then newest first.

    A directory is complete once its manifest exists: converters write the manifest last, by rename.
    """
    found = [(path.parent, read_manifest(path.parent)) for path in models_dir.glob(f"*/*/{MANIFEST_FILE}")]
    return sorted(found, key=lambda pair: (pair[1].name, -(pair[0] / MANIFEST_FILE).stat().st_mtime))
