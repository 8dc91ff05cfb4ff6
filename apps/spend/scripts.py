"""Run spend's Lua scripts by their digest: one Redis trip each, two when the server has just started."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import redis.asyncio as aioredis
from redis import Redis
from redis.exceptions import NoScriptError

from aiscale.redis import execute
from aiscale.wire.scripts import complete_script


@dataclass(frozen=True)
class Script:
    """Hold one script's text and the digest under which Redis keeps it."""

    text: str
    digest: str

    def run(self, client: Redis, keys: Sequence[str], args: Sequence[str | int | bytes]) -> Any:
        """Run it. I/O: one Redis trip. Raises: redis.exceptions.RedisError, OSError."""
        try:
            return client.evalsha(self.digest, len(keys), *keys, *args)
        except NoScriptError:
            return client.eval(self.text, len(keys), *keys, *args)

    async def run_together(self, keys: Sequence[str], args: Sequence[str | int | bytes]) -> Any:
        """Run it with the running loop's client, in one trip with what others ask at the same time. I/O, Raises: as `run_async`."""
        try:
            return await execute("EVALSHA", self.digest, len(keys), *keys, *args)
        except NoScriptError:
            return await execute("EVAL", self.text, len(keys), *keys, *args)

    async def run_async(self, client: aioredis.Redis, keys: Sequence[str], args: Sequence[str | int | bytes]) -> Any:
        """Run it. I/O: one Redis trip. Raises: redis.exceptions.RedisError, OSError."""
        try:
            return await client.evalsha(self.digest, len(keys), *keys, *args)
        except NoScriptError:
            return await client.eval(self.text, len(keys), *keys, *args)


TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in (Path(__file__).parent / "lua").glob("*.lua")}
"""Every script as it was when the process began: a deployment in place must not bring new ones into old code."""


@cache
def get_script(name: str) -> Script:
    """Return ``apps/spend/lua/<name>.lua``, ready to run. I/O: none."""
    text = complete_script(TEXTS[name])
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
