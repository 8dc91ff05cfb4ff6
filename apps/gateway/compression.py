"""Compress whole answers, and read compressed requests without being bombed."""

import asyncio
import zlib
from collections.abc import Callable
from typing import Any

import zstandard

from aiscale.errors import AiscaleError, Code

COMPRESSED_FROM_BYTES = 8 << 10
"""Smaller answers are sent as they are: compressing costs more than it saves."""
THREAD_FROM_BYTES = 256 << 10
ENCODINGS = ("zstd", "gzip")
"""Best first."""
_GZIP_WBITS = 31
_MAX_WINDOW_BYTES = 8 << 20


def choose_encoding(accepted: str | None) -> str | None:
    """Return what an Accept-Encoding header likes best of what is offered; None for as it is."""
    best, best_weight = None, 0.0
    for part in (accepted or "").lower().split(","):
        name, _, parameters = part.strip().partition(";")
        name = name.strip()
        weight = _read_weight(parameters)
        for offered in ENCODINGS:
            if name == offered or (name == "*" and best is None):
                if weight > best_weight or (weight == best_weight and best and _rank(offered) < _rank(best)):
                    best, best_weight = offered, weight
                break
    return best


def _rank(encoding: str) -> int:
    return ENCODINGS.index(encoding)


def _read_weight(parameters: str) -> float:
    name, _, value = parameters.strip().partition("=")
    if name.strip() != "q":
        return 1.0
    try:
        return min(max(float(value), 0.0), 1.0)
    except ValueError:
        return 0.0


async def compress(body: bytes, encoding: str) -> bytes:
    """Compress an answer, on a thread when it is large."""
    if len(body) < THREAD_FROM_BYTES:
        return _compress(body, encoding)
    return await asyncio.to_thread(_compress, body, encoding)


def _compress(body: bytes, encoding: str) -> bytes:
    if encoding == "zstd":
        return zstandard.ZstdCompressor(level=3).compress(body)
    packer = zlib.compressobj(level=5, wbits=_GZIP_WBITS)
    return packer.compress(body) + packer.flush()


async def decompress(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    """Return what a request's body holds. No more than ``limit_bytes`` are ever unpacked.

    Raises: AiscaleError (BODY_TOO_LARGE, INVALID_REQUEST, UNSUPPORTED_ENCODING).
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    unpack: Callable[[bytes, int], bytes] | None = {"gzip": _gunzip, "x-gzip": _gunzip, "zstd": _unzstd}.get(name)
    if unpack is None:
        raise AiscaleError(
            Code.UNSUPPORTED_ENCODING,
            f"The Content-Encoding {name[:40]!r} is not read here. Send {', '.join(ENCODINGS)} or none.",
            param="Content-Encoding",
        )
    try:
        data = await asyncio.to_thread(unpack, body, limit_bytes + 1)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        raise AiscaleError(
            Code.INVALID_REQUEST, f"The body of your request is no proper {name}: {error}.", param="Content-Encoding"
        ) from error
    if len(data) > limit_bytes:
        raise AiscaleError(
            Code.BODY_TOO_LARGE,
            f"The request's body is larger than {limit_bytes} bytes when unpacked. Send less at a time.",
        )
    return data


def _gunzip(body: bytes, most_bytes: int) -> bytes:
    return _unpack(body, most_bytes, 4 << 10, lambda: zlib.decompressobj(wbits=_GZIP_WBITS))


def _unzstd(body: bytes, most_bytes: int) -> bytes:
    # a block of four bytes may hold 128 KiB: few are unpacked at a time
    return _unpack(body, most_bytes, 256, zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj)


def _unpack(body: bytes, most_bytes: int, piece_bytes: int, make: Callable[[], Any]) -> bytes:
    """Unpack all members of a gzip file, or frames of zstd: there may be several. Little more than ``most_bytes`` is ever unpacked.

    Raises: zlib.error, zstandard.ZstdError; EOFError for one that ends in the middle.
    """
    parts: list[bytes] = []
    left, member = most_bytes, None
    for start in range(0, len(body), piece_bytes):
        piece = body[start : start + piece_bytes]
        while piece and left > 0:
            member = member or make()
            parts.append(member.decompress(piece))
            left -= len(parts[-1])
            piece, member = (member.unused_data, None) if member.eof else (b"", member)
    if member is not None and left > 0:
        raise EOFError("it ends in the middle")
    return b"".join(parts)
