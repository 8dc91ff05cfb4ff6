"""Read which part of a file is asked for (RFC 9110, 14.2)."""

import re

from aiscale.errors import AiscaleError, Code

_ONE = re.compile(r"bytes\s*=\s*(?:([0-9]{1,18})\s*-\s*([0-9]{0,18})|-\s*([0-9]{1,18}))", re.IGNORECASE)


def read_range(header: str | None, if_range: str | None, size_bytes: int) -> tuple[int, int] | None:
    """Return the first byte wanted and the one after the last; None for all of the file.

    Several ranges, other units and what is no range are answered with the whole file, as is any ``If-Range``: files have no validators.
    Raises: AiscaleError (RANGE_NOT_SATISFIABLE) for a range that begins behind the end.
    """
    found = None if header is None or if_range is not None else _ONE.fullmatch(header.strip())
    if found is None:
        return None
    first, last, suffix = found.groups()
    if suffix is not None:
        start, end = max(size_bytes - int(suffix), 0), size_bytes
    else:
        start, end = int(first), min(int(last) + 1, size_bytes) if last else size_bytes
        if last and int(last) < start:
            return None
    if start >= end:
        raise AiscaleError(
            Code.RANGE_NOT_SATISFIABLE,
            f"The file has {size_bytes} bytes; none of them is in the range that was asked for.",
            param="Range",
            headers={"content-range": f"bytes */{size_bytes}"},
        )
    return start, end
