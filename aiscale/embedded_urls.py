"""Say where the embedded Postgres and Valkey of a data directory listen, without starting them.

Both listen on sockets in a directory that only the owner of the data directory can enter. `manage.py up` starts them; every other
command of the same checkout finds them here.
"""

import hashlib
import os
import secrets
import tempfile
from pathlib import Path

DATABASE_NAME = "aiscale"
DATABASE_USER = "postgres"
MAX_SOCKET_DIR_BYTES = 85
"""A socket's whole path must stay below 104 (macOS) to 108 (Linux) bytes."""


def socket_dir(data_dir: Path) -> Path:
    """Return the directory of both sockets: ``<data_dir>/run``, or a short one for a data directory with a long name."""
    inside = data_dir / "run"
    if len(os.fsencode(inside)) <= MAX_SOCKET_DIR_BYTES:
        return inside
    name = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"aiscale-{os.getuid()}-{name}"


def embedded_database_url(data_dir: Path) -> str:
    """Return the embedded server's URL, whether it runs or not."""
    return f"postgresql://{DATABASE_USER}@/{DATABASE_NAME}?host={socket_dir(data_dir)}"


def embedded_redis_url(data_dir: Path) -> str:
    """Return the embedded Valkey's URL, whether it runs or not."""
    return f"unix://{socket_dir(data_dir) / 'valkey.sock'}"


def read_secret_key(data_dir: Path) -> str:
    """Return the data directory's secret key, making it at the first call. I/O: one small file, readable by its owner alone."""
    path = data_dir / "secret_key"
    if key := _read(path):
        return key
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        # whole or not at all, and of two processes that start at once the first one counts
        handle, temporary = tempfile.mkstemp(dir=data_dir, prefix=".secret_key-")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(secrets.token_urlsafe(48))
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        Path(temporary).unlink(missing_ok=True)
    return _read(path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
