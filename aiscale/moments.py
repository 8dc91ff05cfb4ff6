"""Read a time that a person wrote: how long from now, or when."""

import re
from datetime import UTC, datetime, timedelta

from aiscale.errors import AiscaleError, Code

_DURATION = re.compile(r"(\d{1,5})([smhd])")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_moment(text: str, param: str) -> datetime:
    """Read a duration from now (``90s``, ``30m``, ``2h``, ``7d``) or a time (``2026-03-01T14:30``, in UTC unless it says otherwise).

    Raises: AiscaleError (INVALID_REQUEST), which names ``param``.
    """
    if match := _DURATION.fullmatch(text.strip()):
        return datetime.now(UTC) + timedelta(seconds=int(match[1]) * _UNITS_S[match[2]])
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise AiscaleError(
            Code.INVALID_REQUEST, f"{text!r} is no time. Write 30m, 2h or 2026-03-01T14:30 (UTC).", param=param
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
