"""Read what a request asks of the answer cache: by the header ``Cache-Control``, or by the body's ``cache`` option."""

import msgspec

from aiscale.errors import AiscaleError, Code
from apps.gateway.exchange import Exchange
from apps.inference.cache.policy import Wish


class CacheOption(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Say it in the body, for clients that cannot set headers."""

    no_cache: bool = msgspec.field(default=False, name="no-cache")
    no_store: bool = msgspec.field(default=False, name="no-store")
    use_cache: bool = msgspec.field(default=False, name="use-cache")


def read_wish(exchange: Exchange, option: CacheOption | None) -> Wish:
    """Return what header and body ask for together.

    ``no-cache``: compute it anew (and keep it); ``no-store``: do not keep it; ``use-cache``: also for answers that are drawn by chance.
    Other directives of the header are meant for proxies. Raises: AiscaleError (INVALID_REQUEST) for wishes that exclude each other.
    """
    header = exchange.find_header("cache-control") or ""
    directives = {part.split("=")[0].strip().lower() for part in header.split(",")}
    option = option or CacheOption()
    wish = Wish(
        read=not (option.no_cache or "no-cache" in directives),
        write=not (option.no_store or "no-store" in directives),
        force=option.use_cache,
    )
    if wish.force and not (wish.read or wish.write):
        raise AiscaleError(
            Code.INVALID_REQUEST,
            "cache asks to use the cache, and neither to read from it nor to write into it. Leave one of them out.",
            param="cache",
        )
    return wish
