"""Every URL, every frame and every route of the API, asked by everybody, answers as the written table says (``table.txt``).

A URL without a row fails, and says the row as it is now: read it, and put it into the table if that is what should be.
"""

import json
from typing import Any, get_args

import pytest
from django.conf import settings
from django.core.cache import cache
from django.db import transaction

from apps.accounts.callers import on_thread
from apps.chat import frames
from apps.chat.models import Message
from apps.gateway.endpoints import ROUTER
from apps.spend import killswitch
from tests.apps.access import routes
from tests.apps.access.table import SECTIONS, Row, compare, forget_others, read_table
from tests.apps.access.world import CHAT, World
from tests.apps.chat.test_chat import ORIGIN, Socket, Talk
from tests.apps.gateway.driver import Exchange
from tests.apps.spend.cast import ADA

FRAMES = [
    ("retry", "message"),
    ("retry", "message-of-removed"),
    ("send", "new"),
    ("send", "personal"),
    ("send", "conversation"),
    ("send", "conversation-of-removed"),
    ("show", "message"),
    ("show", "message-of-removed"),
    ("stop", "message"),
    ("stop", "message-of-removed"),
    ("resume", "message"),
    ("resume", "message-of-removed"),
    ("watch", "conversation"),
    ("watch", "conversation-of-removed"),
    ("ping", "alive"),
]
"""What is sent: a frame, and what of Acme it names. The conversation and the message are the member's."""
PARTS = ("admin/accounts/", "admin/spend/", "admin/", "account", "api/", "")
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "accounts/login/"): {"login": "nobody@example.com", "password": "x"},
    ("POST", "accounts/signup/"): {"email": "new@example.com", "password1": "correct horse 9 battery"},
    ("POST", "account/organizations/"): {"name": "Another"},
    ("POST", "account/organizations/<organization_id>/"): {"name": "Renamed"},
    ("POST", "account/organizations/<organization_id>/delete/"): {"name": "Acme"},
    ("POST", "account/organizations/<organization_id>/members/<member_id>/role/"): {"role": "admin"},
    ("POST", "account/organizations/<organization_id>/invitations/"): {"email": "new@example.com", "role": "member"},
    ("POST", "account/organizations/<organization_id>/webhooks/"): {"url": "https://example.com/another"},
    ("POST", "account/invitations/<token>/"): {"answer": "join"},
    ("POST", "c/<conversation_id>/rename/"): {"title": "Another"},
    ("POST", "api/v1/organizations"): {"name": "Another"},
    ("PATCH", "api/v1/organizations/<organization_id>"): {"name": "Renamed"},
    ("POST", "api/v1/organizations/<organization_id>/transfer"): {"member_id": "<member_id>"},
    ("PATCH", "api/v1/organizations/<organization_id>/members/<member_id>"): {"role": "admin"},
    ("POST", "api/v1/organizations/<organization_id>/invitations"): {"email": "new@example.com"},
    ("POST", "api/v1/organizations/<organization_id>/keys"): {"name": "Another"},
}


def ask(world: World, role: str, method: str, route: str) -> str:
    """Ask as ``role``, take back what that changed, and return the outcome: a status, or ``login`` for who is sent there."""
    client = world.browser
    client.cookies.clear()
    if role in world.cookies:
        client.cookies[settings.SESSION_COOKIE_NAME] = world.cookies[role]
    headers = {"Authorization": f"Bearer {world.keys[role]}"} if role in world.keys else {}
    path = routes.make_path(route, world)
    if method == "GET":
        return name_outcome(client.get(path, headers=headers))
    body = json.loads(json.dumps(BODIES.get((method, route), {})).replace("<member_id>", world.values["member_id"]))
    with transaction.atomic():
        if route.startswith("api/"):
            outcome = name_outcome(client.generic(method, path, json.dumps(body), "application/json", headers=headers))
        else:
            outcome = name_outcome(client.post(path, body, headers=headers))
        transaction.set_rollback(True)
    return outcome


def name_outcome(response: Any) -> str:
    target = response.headers.get("Location", "")
    return "login" if target.startswith(("/accounts/login/", "/admin/login/")) else str(response.status_code)


@pytest.mark.parametrize("part", PARTS)
def test_every_url_answers_as_the_table_says(world: World, part: str) -> None:
    found = []
    for method, route in list_pages():
        if next(each for each in PARTS if route.startswith(each)) == part:
            cache.clear()
            found.append(Row(method, route, tuple(ask(world, role, method, route) for role in SECTIONS["pages"])))
    compare("pages", found)


def test_the_table_has_a_row_for_all_that_is_there_and_no_other() -> None:
    forget_others("pages", list_pages())
    forget_others("v1", [(route.method, route.path) for route in ROUTER.routes])
    assert {kind for kind, _ in FRAMES} == {kind.__struct_config__.tag for kind in get_args(frames.ClientFrame)}
    forget_others("frames", FRAMES)


def test_the_table_hides_what_is_anothers() -> None:
    """Whoever writes the table anew: what belongs to somebody else does not exist, and what was taken back opens nothing."""
    hidden = {"404", "405", "401", "login"}
    for row in read_table("pages"):
        told = dict(zip(SECTIONS["pages"], row.outcomes, strict=True))
        if any(f"<{name}>" in row.route for name in ("organization_id", "conversation_id", "key_id")):
            assert {told[role] for role in ("staff", "superuser", "stranger", "nobody", "revoked")} <= hidden, row
        if "<conversation_id>" in row.route:
            assert {told[role] for role in ("owner", "admin", "billing", "key", "manager")} <= hidden, row
        if row.route.startswith("admin/"):
            outsiders = {outcome for role, outcome in told.items() if role not in ("staff", "superuser")}
            assert outsiders <= {"login", "403"} or row.route == "admin/logout/", row
            is_of_a_model = row.route.split("/")[1] in ("accounts", "spend", "inference", "chat", "gateway")
            assert told["staff"] != "200" or not is_of_a_model, row
        if row.route.startswith("api/v1/"):
            assert told["nobody"] == told["revoked"] == "401", row
    for row in read_table("v1"):
        told = dict(zip(SECTIONS["v1"], row.outcomes, strict=True))
        assert {told[role] for role in ("revoked", "wrong", "none", "session")} == {"401"}, row
        assert told["foreign"] == "404" or "_id}" not in row.route, row
    for row in read_table("frames"):
        told = dict(zip(SECTIONS["frames"], row.outcomes, strict=True))
        assert told["nobody"] == "4401"
        if row.route not in ("personal", "alive"):
            assert {told[role] for role in ("staff", "superuser", "stranger", "removed")} == {"not_found"}, row


def list_pages() -> list[tuple[str, str]]:
    return [(method, route) for route in routes.list_routes() for method in routes.list_methods(route)]


async def ask_v1(world: World, role: str, method: str, path: str) -> str:
    for name, value in world.values.items():
        path = path.replace(f"{{{name}}}", value).replace(f"{{{name}:path}}", value)
    headers = {"cookie": f"{settings.SESSION_COOKIE_NAME}={world.cookies['owner']}"} if role == "session" else {}
    # a body that nobody is served for: who may ask at all is told what is wrong with it
    exchange = Exchange(method, path, key=world.keys.get(role), value={} if method == "POST" else None, headers=headers)
    await exchange.read()
    return str(exchange.status)


async def test_every_route_of_v1_answers_as_the_table_says(world: World) -> None:
    found = []
    for route in ROUTER.routes:
        outcomes = []
        for role in SECTIONS["v1"]:
            await on_thread(world.keep)
            outcomes.append(await ask_v1(world, role, route.method, route.path))
        found.append(Row(route.method, route.path, tuple(outcomes)))
    compare("v1", found)


async def open_talk(world: World, role: str) -> Talk:
    headers = [(b"origin", ORIGIN.encode()), (b"host", b"testserver")]
    if role in world.cookies:
        headers.append((b"cookie", f"{settings.SESSION_COOKIE_NAME}={world.cookies[role]}".encode()))
    from apps.chat.routing import websocket_application

    scope = {"type": "websocket", "path": "/ws/chat/", "headers": headers, "query_string": b"", "subprotocols": []}
    talk = Talk(Socket(websocket_application, scope))
    assert await talk.socket.connect()
    return talk


def make_frame(world: World, kind: str, what: str, role: str) -> dict[str, Any]:
    frame = {"type": kind}
    if kind in ("send", "retry"):
        frame |= {"model": CHAT, "client_id": f"{kind}-{what}-{role}"}
    if kind == "send":
        frame |= {"text": "Hello"}
    targets = {
        "new": {"organization_id": world.acme.public_id},
        "personal": {},
        "conversation": {"conversation_id": world.conversation_id},
        "conversation-of-removed": {"conversation_id": world.removed_conversation_id},
        "message": {"message_id": world.message_id},
        "message-of-removed": {"message_id": world.removed_message_id},
        "alive": {},
    }
    return frame | targets[what]


async def tell(world: World, role: str, kind: str, what: str) -> str:
    """Send one frame as ``role``; return the type of the first answer, an error's code, ``nothing`` or the close code."""
    talk = await open_talk(world, role)
    await talk.tell(**make_frame(world, kind, what, role))
    try:
        message = await talk.socket.receive_output(0.3 if kind == "stop" else 15)
    except TimeoutError:
        return "nothing"
    if message["type"] == "websocket.close":
        return str(message["code"])
    frame = json.loads(message["text"])
    outcome = str(frame["code"] if frame["type"] == "error" else frame["type"])
    if outcome == "turn":
        await talk.hear_until("finished")
        await on_thread(lambda: Message.objects.filter(public_id=frame["message_id"]).update(status="failed"))
    await talk.socket.leave()
    return outcome


async def test_every_frame_is_answered_as_the_table_says(world: World) -> None:
    # who may ask for an answer is told that all is stopped: no worker is needed
    await on_thread(lambda: killswitch.trip("site", reason="A test", by=ADA))
    found = []
    for kind, what in FRAMES:
        outcomes = [await tell(world, role, kind, what) for role in SECTIONS["frames"]]
        found.append(Row(kind, what, tuple(outcomes)))
    compare("frames", found)
