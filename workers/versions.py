"""Choose which versions of which models this worker serves: those that the catalog sends requests to, as far as they are on its disk."""

import logging
from pathlib import Path
from typing import Any

import msgspec

from aiscale.wire import keys
from aiscale.wire.manifest import Manifest, list_manifests
from workers.config import ENV, get_redis

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""(model, version)."""


def read_traffic() -> dict[str, list[str]]:
    """Return the versions of each model that requests are sent to, the main one first. I/O: one Redis trip. Raises: RedisError, OSError."""
    fields: Any = get_redis().hgetall(keys.TRAFFIC)
    found = {}
    for name, value in fields.items():
        try:
            found[name.decode()] = msgspec.json.decode(value, type=list[str])
        except msgspec.MsgspecError as error:
            log.error("the traffic of a model cannot be read: %s", error, extra={"model": name.decode()})
    return found


def list_wanted(traffic: dict[str, list[str]]) -> dict[Key, tuple[Path, Manifest]]:
    """Map what this worker is to serve to its directory; of a model that the catalog says nothing of, the newest version.

    I/O: small files.
    """
    on_disk: dict[str, dict[str, tuple[Path, Manifest]]] = {}
    for directory, manifest in list_manifests(ENV.models_dir):
        if not ENV.worker_models or manifest.name in ENV.worker_models:
            on_disk.setdefault(manifest.name, {})[manifest.version] = (directory, manifest)
    wanted: dict[Key, tuple[Path, Manifest]] = {}
    for name, versions in on_disk.items():
        chosen = [version for version in traffic.get(name, ()) if version in versions] or [next(iter(versions))]
        wanted |= {(name, version): versions[version] for version in chosen}
    return wanted
