"""Compress whole answers, and read compressed requests without being bombed."""

import asyncio
import zlib
from collections.abc import Callable

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
    unpacker = zlib.decompressobj(wbits=_GZIP_WBITS)
    data = unpacker.decompress(body, most_bytes)
    if len(data) < most_bytes and not unpacker.eof:
        raise EOFError("it ends in the middle")
    return data


def _unzstd(body: bytes, most_bytes: int) -> bytes:
    reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).stream_reader(body)
    parts: list[bytes] = []
    left = most_bytes
    while left > 0 and (part := reader.read(min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
