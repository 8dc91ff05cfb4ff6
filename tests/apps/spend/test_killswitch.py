"""Show that a kill switch is in force at once, ends when released, and outlives what Redis forgets."""

import io
import time

import pytest
from django.core.management import CommandError, call_command

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from aiscale.wire.codec import decode_control
from apps.spend import killswitch
from apps.spend.admission import admit
from apps.spend.models import KillSwitch
from tests.apps.spend.cast import MODEL, make_ask, make_caller, make_organization, on_thread, stage, warm

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.parametrize("make_scope", [lambda o: "site", lambda o: f"model:{MODEL}", lambda o: f"organization:{o}"])
async def test_it_refuses_within_a_second_and_lets_go_again(make_scope):
    organization = await stage()
    caller, scope = make_caller(organization), make_scope(organization.public_id)
    await admit(make_ask(caller))
    started = time.monotonic()
    await on_thread(lambda: killswitch.trip(scope, reason="An incident", by="ada"))
    with pytest.raises(AiscaleError) as refusal:
        await admit(make_ask(caller))
    assert time.monotonic() - started < 1
    assert (refusal.value.code, "An incident" in refusal.value.message) == (Code.KILLED, True)
    await on_thread(lambda: killswitch.release(scope, by="bob"))
    await admit(make_ask(caller))
    switch = await on_thread(KillSwitch.objects.get)
    assert (switch.tripped_by, switch.released_by) == ("ada", "bob")


def test_everybody_is_told(client):
    listener = client.pubsub(ignore_subscribe_messages=True)
    listener.subscribe(keys.CONTROL_CHANNEL)
    listener.get_message(timeout=1)
    killswitch.trip("model:m", reason="Bad answers", by="ada")
    killswitch.release("model:m", by="ada")
    orders = []
    while len(orders) < 2 and (message := listener.get_message(timeout=2)):
        orders.append(decode_control(message["data"]))
    listener.close()
    assert [(order.order, order.scope, order.reason) for order in orders] == [
        ("kill", "model:m", "Bad answers"),
        ("release", "model:m", ""),
    ]


def test_tripping_twice_keeps_the_first_and_history_stays():
    first = killswitch.trip("site", reason="one", by="ada")
    assert killswitch.trip("site", reason="two", by="bob").pk == first.pk
    killswitch.release("site", by="ada")
    killswitch.trip("site", reason="three", by="bob")
    assert [switch.reason for switch in killswitch.list_active()] == ["three"]
    assert KillSwitch.objects.count() == 2


def test_restore_writes_what_is_in_force_and_nothing_else(client):
    killswitch.trip("site", reason="one", by="ada")
    client.delete(keys.KILLED)
    client.hset(keys.KILLED, "model:left-behind", "an order that was withdrawn")
    killswitch.restore()
    assert client.hgetall(keys.KILLED) == {b"loaded": b"1", b"site": b"one"}


@pytest.mark.parametrize(
    "scope", ["", "everything", "site:x", "model:", "model:a b", "organization:org_nobody", "user:1"]
)
def test_a_scope_that_cannot_be_is_refused(scope):
    with pytest.raises(AiscaleError) as refusal:
        killswitch.trip(scope, reason="x", by="ada")
    assert refusal.value.code is Code.INVALID_REQUEST


@pytest.mark.parametrize("reason", ["", "   ", "x" * 301, "a\0b"])
def test_a_reason_that_cannot_be_shown_is_refused(reason):
    with pytest.raises(AiscaleError) as refusal:
        killswitch.trip("site", reason=reason, by="ada")
    assert refusal.value.param == "reason"


def test_releasing_what_is_not_stopped_is_refused():
    with pytest.raises(AiscaleError) as refusal:
        killswitch.release("site", by="ada")
    assert refusal.value.code is Code.NOT_FOUND


def test_without_redis_the_order_is_recorded_and_comes_into_force_later(client, settings, tmp_path):
    url = settings.REDIS_URL
    settings.REDIS_URL = f"unix://{tmp_path}/nobody.sock"
    redis_clients.get_sync.cache_clear()
    try:
        killswitch.trip("site", reason="An incident", by="ada")
    finally:
        settings.REDIS_URL = url
        redis_clients.get_sync.cache_clear()
    assert [switch.scope for switch in killswitch.list_active()] == ["site"]
    killswitch.restore()
    assert client.hget(keys.KILLED, "site") == b"An incident"


def test_the_sentence_says_who_is_stopped():
    organization = warm(make_organization(name="Ada's"))
    assert "every request of every user, in the chat" in killswitch.describe("site")
    assert "to the model 'm'" in killswitch.describe("model:m")
    assert str(organization) in killswitch.describe(f"organization:{organization.public_id}")


def run(*args) -> str:
    out = io.StringIO()
    call_command("killswitch", *args, stdout=out)
    return out.getvalue()


def test_the_command_trips_lists_and_releases():
    assert "Nothing is stopped." in run("list")
    assert "This stops every request of every user" in run("trip", "site", "--reason", "An incident")
    assert "An incident" in run("list")
    assert "works again" in run("release", "site")
    with pytest.raises(CommandError, match="No kill switch is in force"):
        run("release", "site")
    with pytest.raises(CommandError, match="is no scope"):
        run("trip", "nonsense", "--reason", "x")
