"""Route every connection: the inference API before Django, WebSockets to the chat, all else to Django."""

import multiprocessing
import os
import sys

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "aiscale.settings.base")

from channels.routing import ProtocolTypeRouter
from django.core.asgi import get_asgi_application

django_application = get_asgi_application()

import aiscale.celery  # noqa: E402, F401  # loaded now, and not by the first request
from aiscale import heap  # noqa: E402
from aiscale import redis as redis_clients  # noqa: E402
from aiscale.embedded.privileges import end_with  # noqa: E402
from aiscale.wire import metrics  # noqa: E402
from apps.chat.routing import websocket_application  # noqa: E402
from apps.gateway import doorstep  # noqa: E402
from apps.gateway.asgi import GatewayApplication  # noqa: E402

if (server := multiprocessing.parent_process()) and server.pid:
    # it would hold the port for good once the server that started it, and takes it down, is killed
    end_with(server.pid)
heap.settle()
# Granian's own threads hand each request to this one, and wait up to so long for the interpreter; by default it is ten times as much
sys.setswitchinterval(0.0005)
doorstep.install()

application = ProtocolTypeRouter(
    {
        # /v1/... is answered by plain ASGI (about 2 ms of CPU a request less than through Django); the rest falls through
        "http": GatewayApplication(fallback=django_application),
        "websocket": websocket_application,
    }
)

metrics.start_reporting("web", redis_clients.get_sync)
