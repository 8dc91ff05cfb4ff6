"""Say what an import is going to make, and how."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiscale.wire.manifest import Manifest
from workers.artifacts import build


@dataclass(frozen=True)
class Plan:
    """Be an import that is about to be made. ``make(work, made, report)`` fills the folder ``made``, and adds lines to the report."""

    kind: str
    version: str
    make: Callable[[Path, Path, list[str]], Manifest]


def name_version(files: list[Path], kind: str, precision: str) -> str:
    """Name what the converter makes of these files: 12 hex digits. I/O: hashes them."""
    made = [str(build.REVISIONS[kind]), precision, *build.name_bytes(precision)]
    parts = [*(build.hash_file(path) for path in files), *made]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
