"""Serve the refusals of a full process whose event loop can be made to stand still: an application for Granian, run by test_doorstep.py."""

import os
import time
from pathlib import Path
from typing import Any

import django

django.setup()

from aiscale import overload  # noqa: E402
from apps.gateway import doorstep  # noqa: E402
from apps.gateway.asgi import GatewayApplication  # noqa: E402

assert doorstep.install()
overload.EPOCH_S = 3_600.0  # an epoch does not end within a test
RUN_DIR = Path(os.environ["STUCK_DIR"])


async def answer_page(scope: Any, receive: Any, send: Any) -> None:
    """Be full, or stand still until a file is there."""
    if scope["path"] == "/fill":
        crowd = overload.get_crowd()
        crowd.is_shedding, crowd.places = True, 0
    if scope["path"] == "/stick":
        (RUN_DIR / "stuck").touch()
        while not (RUN_DIR / "go").exists():
            time.sleep(0.01)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


application = GatewayApplication(fallback=answer_page)
