"""Versions of a model share its requests by weight; a canary that fails too often is rolled back by itself, others by hand."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core import mail
from django.core.management import CommandError, call_command
from django.test import Client
from django.utils import timezone
from redis import Redis

from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from apps.accounts import audit
from apps.accounts.callers import on_thread
from apps.accounts.models import AuditEvent, User
from apps.inference import catalog, completions, presence, prompts, traffic
from apps.inference.completions import CompletionRequest
from apps.inference.models import Model, ModelVersion
from apps.inference.prompts import ChatMessage
from apps.spend import settlement, webhooks
from tests.apps.conftest import Cast
from tests.apps.spend.cast import make_finished
from tests.apps.spend.test_alerts import Receiver

MODEL, NEW = "smollm2-135m-instruct", "canary000001"
BY = audit.by_system("test")


@pytest.fixture
def staged(cast: Cast, redis_url: str) -> Any:
    """A second version of the chat model, and nothing sent to it yet."""
    model = Model.objects.get(slug=MODEL)
    ModelVersion.objects.create(model=model, version=NEW, precision="int4", context_tokens=100)
    presence.forget()
    yield model
    presence.forget()


@pytest.fixture
def files(staged: Model, served_models_dir: Path) -> Iterator[Path]:
    """The second version's files: those of the first."""
    link = served_models_dir / MODEL / NEW
    link.symlink_to(served_models_dir / MODEL / staged.version)
    yield link
    if link.is_symlink():
        link.unlink()
    shutil.rmtree(link, ignore_errors=True)
    prompts._load.cache_clear()


def tell_presence(redis_url: str, *workers: list[str]) -> None:
    """Be workers that serve these versions."""
    client = Redis.from_url(redis_url)
    for name in client.scan_iter(keys.WORKER_PRESENCE_PATTERN):
        client.delete(name)
    for number, versions in enumerate(workers):
        said = {
            "worker_id": f"w{number}",
            "models": {MODEL: versions[0]},
            "versions": {MODEL: versions},
            "providers": ["fake"],
        }
        client.set(
            keys.worker_presence(f"w{number}"), json.dumps(said | {"running": 0, "waiting": 0, "started_at_ms": 1})
        )
    client.close()
    presence.forget()


async def spread(count: int = 1000) -> dict[str, int]:
    catalog.forget()
    model = await catalog.get_model(MODEL)
    chosen = [(await traffic.choose_version(model, f"job_{index}")) for index in range(count)]
    assert all(each.context_tokens == (100 if each.version == NEW else model.context_tokens) for each in chosen)
    return {version: sum(each.version == version for each in chosen) for version in {each.version for each in chosen}}


async def test_what_only_the_main_version_can_read_goes_to_it(
    cast: Cast, staged: Model, redis_url: str, files: Path
) -> None:
    """Token ids are of the main version's vocabulary; and a server without the canary's files answers with what it has."""
    await on_thread(lambda: traffic.set_weight(MODEL, NEW, 99, by=BY))
    tell_presence(redis_url, [staged.version, NEW])
    assert (await spread(50)).get(NEW, 0) > 40

    async def send(job_id: str, **asked: Any) -> str:
        asked = {"messages": [], "prompt_token_ids": [5, 6], "max_tokens": 2} | asked
        request = CompletionRequest(request_id=job_id, source="api", model=MODEL, job_id=job_id, **asked)
        async with await completions.start(request, cast.caller) as run:
            return run.model_version

    words: Any = {"messages": [ChatMessage(role="user", content="tea " * 20)], "prompt_token_ids": None}
    assert {await send(f"job_alike{number}") for number in range(3)} == {NEW}, "the same tokenizer, the same ids"
    main = files.resolve()
    await on_thread(files.unlink)
    copy_with_other_words(main, files)
    prompts._load.cache_clear()
    assert (await spread(50)).get(NEW, 0) > 40, "texts are written in the canary's own words"
    assert {await send(f"job_unlike{number}") for number in range(3)} == {staged.version}
    biased = words | {"logit_bias": {7: 5.0}}
    assert {await send(f"job_biased{number}", **biased) for number in range(3)} == {staged.version}, "ids of its words"
    assert {await send(f"job_worded{number}", **words) for number in range(3)} == {NEW}
    text = {"words": "tea " * 20, "prompt_token_ids": None}
    assert {await send(f"job_text{number}", **text) for number in range(3)} == {NEW}
    begun = words | {"words": "Tea"}
    assert {await send(f"job_begun{number}", **begun) for number in range(3)} == {NEW}
    long = words | {"messages": [ChatMessage(role="user", content="tea " * 200)]}
    assert {await send(f"job_long{number}", **long) for number in range(3)} == {staged.version}, (
        "100 tokens are its most"
    )
    said = json.loads((files / "manifest.json").read_text()) | {"chat_template": None}
    (files / "manifest.json").write_text(json.dumps(said))
    prompts._load.cache_clear()
    assert {await send(f"job_chat{number}", **words) for number in range(3)} == {staged.version}, "it takes no chats"
    assert {await send(f"job_words{number}", **text) for number in range(3)} == {NEW}
    await on_thread(lambda: shutil.rmtree(files))
    prompts._load.cache_clear()
    assert await spread(50) == {staged.version: 50}


def copy_with_other_words(source: Path, target: Path) -> None:
    """Be a version whose tokenizer is another file."""
    target.mkdir()
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
    said = json.loads((source / "manifest.json").read_text())
    said["files"]["tokenizer.json"] = "0" * 64
    (target / "manifest.json").write_text(json.dumps(said))


async def test_requests_are_spread_by_weight_once_every_worker_has_the_version(
    staged: Model, redis_url: str, files: Path
) -> None:
    assert await spread() == {staged.version: 1000}
    await on_thread(lambda: traffic.set_weight(MODEL, NEW, 20, by=BY))
    client = Redis.from_url(redis_url)
    assert json.loads(client.hget(keys.TRAFFIC, MODEL)) == [staged.version, NEW]  # type: ignore[arg-type]
    tell_presence(redis_url, [staged.version, NEW], [staged.version])
    assert await spread() == {staged.version: 1000}, "one worker has not loaded it"
    tell_presence(redis_url, [staged.version, NEW], [staged.version, NEW])
    found = await spread()
    assert 150 < found[NEW] < 250 and found == await spread(), "a job keeps its version"
    await on_thread(lambda: traffic.promote(MODEL, NEW, by=BY))
    assert await spread() == {NEW: 1000}
    done = await on_thread(lambda: traffic.roll_back(MODEL, by=BY, reason="It is worse"))
    assert staged.version in done and await spread() == {staged.version: 1000}
    events = await on_thread(
        lambda: list(AuditEvent.objects.filter(target=f"model:{MODEL}").values_list("action", flat=True))
    )
    assert sorted(events) == ["model.canary", "model.promote", "model.rollback"]
    client.close()


def settle(cast: Cast, good: int, bad: int, version: str = NEW) -> None:
    organization = cast.organization.public_id
    ends = ["stop"] * good + ["error"] * bad
    for end in ends:
        settlement.settle(make_finished(organization, model=MODEL, model_version=version, finish_reason=end))


@pytest.mark.parametrize(
    ("good", "bad", "rolled_back"), [(19, 0, False), (10, 9, False), (95, 5, False), (94, 6, True), (18, 2, True)]
)
def test_a_canary_that_fails_too_often_is_rolled_back_by_itself(
    cast: Cast, staged: Model, redis_url: str, good: int, bad: int, rolled_back: bool
) -> None:
    User.objects.create_superuser("root@example.com", "correct horse 9 battery")
    settle(cast, 0, 30)  # before it was a canary
    traffic.set_weight(MODEL, NEW, 20, by=BY)
    settle(cast, good, bad)
    settle(cast, 0, 30, staged.version)
    assert traffic.watch() == int(rolled_back)
    row = ModelVersion.objects.get(version=NEW)
    assert (row.weight, row.alert_due) == (0 if rolled_back else 20, False)
    events = list(AuditEvent.objects.filter(action="model.rollback"))
    assert len(events) == len(mail.outbox) == int(rolled_back)
    assert traffic.watch() == 0 and len(mail.outbox) == int(rolled_back), "once"
    if rolled_back:
        assert events[0].actor == "canary watch" and events[0].details["errors"] == bad
        assert (
            mail.outbox[0].to == ["root@example.com"]
            and f"{bad} of {good + bad} requests failed" in mail.outbox[0].body
        )
        assert json.loads(Redis.from_url(redis_url).hget(keys.TRAFFIC, MODEL)) == [staged.version]  # type: ignore[arg-type]
        assert asyncio.run(spread()) == {staged.version: 1000}
        traffic.set_weight(MODEL, NEW, 20, by=BY)
        assert traffic.watch() == 0, "a new try begins with a clean slate"


def test_what_cannot_be_is_refused_by_name(staged: Model) -> None:
    embed = Model.objects.get(kind="embed")
    ModelVersion.objects.create(model=embed, version=NEW, precision="int8", context_tokens=100)
    tries: list[tuple[Any, Code, str]] = [
        (lambda: traffic.set_weight("nothing", NEW, 5, by=BY), Code.NOT_FOUND, "no model"),
        (lambda: traffic.set_weight(MODEL, "nothing", 5, by=BY), Code.NOT_FOUND, "no version"),
        (lambda: traffic.set_weight(MODEL, staged.version, 5, by=BY), Code.INVALID_REQUEST, "main version"),
        (lambda: traffic.set_weight(MODEL, NEW, 100, by=BY), Code.INVALID_REQUEST, "0 to 99"),
        (lambda: traffic.set_weight(embed.slug, NEW, 5, by=BY), Code.INVALID_REQUEST, "must not be mixed"),
        (lambda: traffic.promote(MODEL, staged.version, by=BY), Code.INVALID_REQUEST, "already"),
        (lambda: traffic.roll_back(MODEL, by=BY, reason="x"), Code.INVALID_REQUEST, "no canary and no version before"),
    ]
    for act, code, words in tries:
        with pytest.raises(AiscaleError, match=words) as refused:
            act()
        assert refused.value.code is code
    assert not AuditEvent.objects.filter(action__startswith="model.").exists()


def test_the_command_and_the_admin_do_the_same(cast: Cast, staged: Model) -> None:
    def command(*arguments: str) -> str:
        output = StringIO()
        call_command("model_traffic", MODEL, *arguments, stdout=output)
        return output.getvalue()

    assert f"{NEW}  int4  0 MB  canary, 7 of 100; 0 of 0 requests failed" in command("--canary", NEW, "--weight", "7")
    assert "main, 100 of 100" in command("--roll-back") and "rolled back: Asked for" in command()
    with pytest.raises(CommandError, match="no version 'x'"):
        command("--promote", "x")

    browser = Client()
    browser.force_login(User.objects.create_superuser("root@example.com", "correct horse 9 battery"))
    row = ModelVersion.objects.get(version=NEW)
    page = browser.get(f"/admin/inference/modelversion/{row.pk}/change/")
    assert page.status_code == 200 and b"batch-invariant" in page.content.lower()
    refused = browser.post(f"/admin/inference/modelversion/{row.pk}/change/", {"weight": "100"})
    assert refused.status_code == 200 and ModelVersion.objects.get(pk=row.pk).weight == 0
    for main in ModelVersion.objects.exclude(pk=row.pk):
        assert b'name="weight"' not in browser.get(f"/admin/inference/modelversion/{main.pk}/change/").content
    browser.post(f"/admin/inference/modelversion/{row.pk}/change/", {"weight": "30"})
    row.refresh_from_db()
    assert row.weight == 30 and row.canary_since is not None
    act = {"action": "roll_back", "_selected_action": [str(row.pk)]}
    told = browser.post("/admin/inference/modelversion/", act, follow=True)
    row.refresh_from_db()
    assert row.weight == 0 and b"gets no more requests" in told.content
    browser.post("/admin/inference/modelversion/", act | {"action": "promote"}, follow=True)
    assert Model.objects.get(slug=MODEL).version == NEW
    assert AuditEvent.objects.filter(action__startswith="model.", actor="root@example.com").count() == 3


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


def test_webhooks_are_told_of_a_roll_back_until_they_took_it(cast: Cast, staged: Model, receiver: Receiver) -> None:
    """Each endpoint of the site once, with the same id over all tries; not the organizations'."""
    site, secret = webhooks.make_endpoint(receiver.url)
    away, _ = webhooks.make_endpoint("http://127.0.0.1:9/away")
    webhooks.make_endpoint(receiver.url, cast.organization)
    traffic.set_weight(MODEL, NEW, 20, by=BY)
    settle(cast, 10, 12)
    receiver.status = 503
    assert traffic.watch() == 1
    row = ModelVersion.objects.get(version=NEW)
    assert row.webhooks_owed.split() == [site.public_id, away.public_id] and row.webhooks_due_at is not None
    traffic.watch()
    assert len(receiver.taken) == 1, "not before it is due"
    receiver.status = 200
    for _ in range(2):
        ModelVersion.objects.filter(pk=row.pk).update(webhooks_due_at=timezone.now())
        traffic.watch()
    assert len(receiver.taken) == 2, "who took it is not told again"
    (first, body), (second, _) = receiver.taken
    assert first["webhook-id"] == second["webhook-id"]
    signature = webhooks.sign(secret, second["webhook-id"], int(second["webhook-timestamp"]), body)
    assert signature in second["webhook-signature"]
    told = json.loads(body)
    assert told["type"] == "model.canary_rolled_back" and told["data"]["version"] == NEW
    assert told["data"]["main_version"] == staged.version and "12 of 22 requests failed" in told["data"]["text"]
    row.refresh_from_db()
    assert row.webhooks_owed == away.public_id
    ModelVersion.objects.filter(pk=row.pk).update(webhook_attempts=8, webhooks_due_at=timezone.now())
    traffic.watch()
    row.refresh_from_db()
    assert row.webhooks_owed == "" and row.webhooks_due_at is None, "after a day it is given up"
