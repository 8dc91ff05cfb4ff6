"""Give every table the same spine: a public id that tells nothing, exact money, and times."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import connection, models, transaction

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]
"""Ten bits each."""
NANOUSD_PER_USD = 1_000_000_000


def make_public_id(prefix: str) -> str:
    """Make an id such as ``org_01jb...``: 26 characters of Crockford base 32, sortable by the millisecond, 80 random bits."""
    value = (time.time_ns() // 1_000_000 << 80) | int.from_bytes(os.urandom(10))
    return f"{prefix}_" + "".join([_PAIRS[(value >> shift) & 1023] for shift in range(120, -1, -10)])


def format_usd(nanousd: int) -> str:
    """Write money exactly, at least two decimals: 1_500_000_000 -> ``$1.50``, 12_345 -> ``$0.000012345``."""
    sign, value = ("-", -nanousd) if nanousd < 0 else ("", nanousd)
    whole, part = divmod(value, NANOUSD_PER_USD)
    decimals = f"{part:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}${whole:,}.{decimals}"


@contextmanager
def snapshot() -> Iterator[None]:
    """See the database as it was at one moment through several statements, so that their sums agree. Read only.

    I/O: two SQL statements. Raises: django.db.Error within a transaction that has read already.
    """
    with transaction.atomic(durable=True):
        with connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        yield


class NanoUsdField(models.BigIntegerField):  # type: ignore[type-arg]  # generic in the stubs alone
    """Hold money as whole nano-US-dollars (1 USD = 1,000,000,000). Never a float."""

    description = "Money in nano-US-dollars"


class Row(models.Model):
    """Carry ``public_id`` (what the outside sees; the primary key stays inside) and times."""

    PUBLIC_ID_PREFIX = "row"

    public_id = models.CharField(max_length=40, unique=True, editable=False)
    created_at = models.DateTimeField(auto_now_add=True, db_index=False)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        abstract = True

    def save(self, *args: Any, **kwargs: Any) -> None:
        if not self.public_id:
            self.public_id = make_public_id(self.PUBLIC_ID_PREFIX)
        super().save(*args, **kwargs)
