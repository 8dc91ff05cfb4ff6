"""Show that a kill switch is in force at once, ends when released, and outlives what Redis forgets."""

import io
import json
import time
from datetime import UTC, datetime, timedelta

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from aiscale.wire.codec import decode_control
from apps.accounts.keys import create_key, revoke_key
from apps.accounts.models import ApiKey, AuditEvent, User
from apps.spend import killswitch, reach
from apps.spend.admission import admit
from apps.spend.models import KillSwitch
from tests.apps.spend.cast import ADA, BOB, MODEL, make_ask, make_caller, make_organization, on_thread, stage, warm

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.parametrize(
    "scope", ["site", f"model:{MODEL}", "plan:free", "organization:{}", "key:{key}", "provider:local"]
)
async def test_it_refuses_the_very_next_request_and_lets_go_again(scope):
    organization = await stage()
    key = await on_thread(lambda: make_key(organization))
    caller, scope = (
        make_caller(organization, key_digest=key.digest, key_id=key.public_id),
        scope.format(organization.public_id, key=key.public_id),
    )
    await admit(make_ask(caller))
    await on_thread(lambda: killswitch.trip(scope, reason="An incident", by=ADA))
    with pytest.raises(AiscaleError) as refusal:
        await admit(make_ask(caller))
    assert (refusal.value.code, "An incident" in refusal.value.message) == (Code.KILLED, True)
    await on_thread(lambda: killswitch.release(scope, by=BOB, reason="It is over"))
    await admit(make_ask(caller))
    switch = await on_thread(KillSwitch.objects.get)
    assert (switch.tripped_by, switch.released_by, switch.release_reason) == ("ada", "bob", "It is over")


def make_key(organization):
    return create_key(organization, User.objects.create_user("ada@example.com", "x"))[0]


def test_everybody_is_told(client):
    listener = client.pubsub(ignore_subscribe_messages=True)
    listener.subscribe(keys.CONTROL_CHANNEL)
    listener.get_message(timeout=1)
    killswitch.trip("model:m", reason="Bad answers", by=ADA)
    killswitch.release("model:m", by=ADA)
    orders = []
    while len(orders) < 2 and (message := listener.get_message(timeout=2)):
        orders.append(decode_control(message["data"]))
    listener.close()
    assert [(order.order, order.scope, order.reason) for order in orders] == [
        ("kill", "model:m", "Bad answers"),
        ("release", "model:m", ""),
    ]


def test_tripping_twice_keeps_the_first_and_history_stays():
    first = killswitch.trip("site", reason="one", by=ADA)
    assert killswitch.trip("site", reason="two", by=BOB).pk == first.pk
    killswitch.release("site", by=ADA)
    killswitch.trip("site", reason="three", by=BOB)
    assert [switch.reason for switch in killswitch.list_active()] == ["three"]
    assert KillSwitch.objects.count() == 2


def test_restore_writes_what_is_in_force_and_nothing_else(client):
    killswitch.trip("site", reason="one", by=ADA)
    client.delete(keys.KILLED)
    client.hset(keys.KILLED, "model:left-behind", "an order that was withdrawn")
    killswitch.restore()
    assert client.hgetall(keys.KILLED) == {b"loaded": b"1", b"site": b"|one"}


async def test_what_a_revoked_key_started_ends_also_where_the_message_was_missed(client):
    organization = await stage()
    key = await on_thread(lambda: make_key(organization))
    await on_thread(lambda: revoke_key(key))
    await on_thread(killswitch.restore)
    until_ms, _, reason = client.hget(keys.KILLED, f"key:{key.public_id}").decode().partition("|")
    assert reason == "its API key was revoked" and int(until_ms) > time.time() * 1000
    # the caller reads why it is refused from now on, and that is no kill switch
    with pytest.raises(AiscaleError) as refusal:
        await admit(make_ask(make_caller(organization, key_digest=key.digest)))
    assert refusal.value.code is Code.KEY_REVOKED
    await on_thread(lambda: ApiKey.objects.update(revoked_at=timezone.now() - timedelta(hours=2)))
    await on_thread(killswitch.restore)
    assert not client.hexists(keys.KILLED, f"key:{key.public_id}"), "long ago: nothing of it can run any more"


def test_an_end_is_written_down_as_of_its_moment(client):
    until_at = timezone.now() + timedelta(seconds=0.3)
    killswitch.trip("site", reason="one", by=ADA, until_at=until_at)
    assert client.hget(keys.KILLED, "site") == f"{int(until_at.timestamp() * 1000)}|one".encode()
    assert killswitch.release_due() == 0
    time.sleep(0.35)
    assert killswitch.list_active() == [], "it is over before anybody writes it down"
    killswitch.restore()
    assert client.hgetall(keys.KILLED) == {b"loaded": b"1"}
    switch = KillSwitch.objects.get()
    assert (switch.released_at, switch.released_by) == (until_at, "time")
    assert killswitch.trip("site", reason="two", by=BOB).pk != switch.pk


def test_a_later_end_counts_and_an_earlier_one_does_not():
    now = timezone.now()
    first = killswitch.trip("site", reason="one", by=ADA, until_at=now + timedelta(hours=1))
    assert killswitch.trip("site", reason="two", by=BOB, until_at=now + timedelta(minutes=1)).until_at == first.until_at
    later = now + timedelta(hours=2)
    assert killswitch.trip("site", reason="three", by=BOB, until_at=later).until_at == later
    assert killswitch.trip("site", reason="four", by=BOB).until_at is None
    [switch] = killswitch.list_active()
    assert (switch.reason, switch.tripped_by) == ("one", "ada")
    actions = list(AuditEvent.objects.order_by("pk").values_list("action", "reason"))
    assert actions == [("killswitch.trip", "one"), ("killswitch.extend", "three"), ("killswitch.extend", "four")]


def test_every_trip_release_and_end_is_audited():
    organization = make_organization()
    scope = f"organization:{organization.public_id}"
    killswitch.trip(scope, reason="An incident", by=ADA)
    killswitch.release(scope, by=BOB, reason="It is over")
    killswitch.trip("site", reason="Short", by=ADA, until_at=timezone.now() + timedelta(seconds=0.05))
    time.sleep(0.1)
    killswitch.release_due()
    events = list(
        AuditEvent.objects.order_by("pk").values_list("action", "target", "actor", "reason", "organization_id")
    )
    assert events == [
        ("killswitch.trip", scope, "ada", "An incident", organization.public_id),
        ("killswitch.release", scope, "bob", "It is over", organization.public_id),
        ("killswitch.trip", "site", "ada", "Short", ""),
        ("killswitch.expire", "site", "time", "", ""),
    ]


@pytest.mark.parametrize("when", [timedelta(seconds=-1), timedelta(days=400)])
def test_an_end_that_cannot_be_is_refused(when):
    with pytest.raises(AiscaleError) as refusal:
        killswitch.trip("site", reason="x", by=ADA, until_at=timezone.now() + when)
    assert refusal.value.param == "until"


@pytest.mark.parametrize("text", ["", "soon", "5", "5 m", "m", "2026-13-01", "-5m"])
def test_a_time_that_is_none_is_refused(text):
    with pytest.raises(AiscaleError) as refusal:
        killswitch.parse_end(text)
    assert refusal.value.param == "until"


def test_times_are_read_as_written():
    assert timedelta(minutes=29) < killswitch.parse_end("30m") - timezone.now() <= timedelta(minutes=30)
    assert killswitch.parse_end("2026-03-01T14:30") == datetime(2026, 3, 1, 14, 30, tzinfo=UTC)
    assert killswitch.parse_end("2026-03-01 14:30+02:00") == datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    "scope",
    [
        "",
        "everything",
        "site:x",
        "model:",
        "model:a b",
        "plan:none",
        "organization:org_nobody",
        "key:key_none",
        "provider:",
        "user:1",
    ],
)
def test_a_scope_that_cannot_be_is_refused(scope):
    with pytest.raises(AiscaleError) as refusal:
        killswitch.trip(scope, reason="x", by=ADA)
    assert refusal.value.code is Code.INVALID_REQUEST


@pytest.mark.parametrize("reason", ["", "   ", "x" * 301, "a\0b"])
def test_a_reason_that_cannot_be_shown_is_refused(reason):
    with pytest.raises(AiscaleError) as refusal:
        killswitch.trip("site", reason=reason, by=ADA)
    assert refusal.value.param == "reason"


def test_releasing_what_is_not_stopped_is_refused():
    with pytest.raises(AiscaleError) as refusal:
        killswitch.release("site", by=ADA)
    assert refusal.value.code is Code.NOT_FOUND


def test_without_redis_the_order_is_recorded_and_comes_into_force_later(client, settings, tmp_path):
    url = settings.REDIS_URL
    settings.REDIS_URL = f"unix://{tmp_path}/nobody.sock"
    redis_clients.get_sync.cache_clear()
    try:
        killswitch.trip("site", reason="An incident", by=ADA)
    finally:
        settings.REDIS_URL = url
        redis_clients.get_sync.cache_clear()
    assert [switch.scope for switch in killswitch.list_active()] == ["site"]
    killswitch.restore()
    assert client.hget(keys.KILLED, "site") == b"|An incident"


def test_the_sentences_say_who_is_stopped_what_they_read_and_until_when():
    organization = warm(make_organization(name="Ada's"))
    make_key(organization)
    make_organization(name="Bob's")
    site = " ".join(reach.describe_trip("site", "An incident", None))
    assert "This stops every request of everybody: 2 organizations with 1 API key are refused" in site
    assert "0 running answers and 0 waiting requests end within a second" in site
    assert "“This service is stopped for now: An incident. Try again later.”" in site
    assert "It lasts until somebody releases it." in site
    until_at = (timezone.now() + timedelta(days=3)).replace(hour=14, minute=30, second=0, microsecond=0)
    moment = f"{until_at:%-d %B %Y}, 14:30 UTC"
    one = " ".join(reach.describe_trip(f"organization:{organization.public_id}", "An incident", until_at))
    assert "the organization Ada's: 1 organization with 1 API key is refused from" in one
    assert f"until {moment} (in " in one and f"Try again after {moment}." in one
    assert "Check the spelling" in " ".join(reach.describe_trip("model:smol", "x", None))
    assert "there is only local. Check the spelling." in " ".join(reach.describe_trip("provider:lokal", "x", None))
    assert "spelling" not in " ".join(reach.describe_trip("provider:local", "x", None))
    killswitch.trip("model:smol", reason="one", by=ADA)
    assert "stopped already, by ada, until somebody releases it" in " ".join(
        reach.describe_trip("model:smol", "x", None)
    )


def test_the_sentences_say_who_goes_on_and_who_does_not():
    make_organization()
    killswitch.trip("plan:free", reason="Abuse", by=ADA)
    killswitch.trip("site", reason="An incident", by=BOB)
    [switch] = [switch for switch in killswitch.list_active() if switch.scope == "plan:free"]
    sentences = " ".join(reach.describe_release(switch))
    assert "This lets every request of the Free plan go on: 1 organization with 0 API keys" in sentences
    assert "stopped by ada on" in sentences and "“Abuse”" in sentences
    assert "1 other kill switch stays in force" in sentences


def run(*args) -> str:
    out = io.StringIO()
    call_command("killswitch", *args, stdout=out)
    return out.getvalue()


def test_the_command_trips_lists_and_releases():
    assert "Nothing is stopped." in run("list")
    told = run("trip", "site", "--reason", "An incident", "--until", "2h")
    assert "This stops every request of everybody" in told and "site is stopped, until " in told
    assert "An incident" in run("list")
    assert "works again" in run("release", "site", "--reason", "It is over")
    with pytest.raises(CommandError, match="No kill switch is in force"):
        run("release", "site")
    with pytest.raises(CommandError, match="is no scope"):
        run("trip", "nonsense", "--reason", "x")
    with pytest.raises(CommandError, match="is no time"):
        run("trip", "site", "--reason", "x", "--until", "soon")
    actors = set(AuditEvent.objects.values_list("actor_kind", flat=True))
    assert actors == {"command"}


def test_the_command_speaks_json_and_can_only_look():
    assert json.loads(run("list", "--json")) == []
    tomorrow = f"{timezone.now() + timedelta(days=1):%Y-%m-%dT%H:%M}"
    would = json.loads(run("trip", "site", "--reason", "x", "--dry-run", "--json"))["would"]
    assert would[0].startswith("This stops") and not killswitch.list_active()
    tripped = json.loads(run("trip", "model:m", "--reason", "Bad answers", "--until", tomorrow, "--json"))
    assert (tripped["scope"], tripped["until_at"]) == ("model:m", f"{tomorrow}:00+00:00")
    assert json.loads(run("list", "--json")) == [tripped]
    assert "This lets every request to the model 'm' go on" in run("release", "model:m", "--dry-run")
    released = json.loads(run("release", "model:m", "--reason", "Mended", "--json"))
    assert released["release_reason"] == "Mended" and json.loads(run("list", "--json")) == []
