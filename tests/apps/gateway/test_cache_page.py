"""What the cache did, on page and API; and who empties it. Real worker (fake runner), Valkey, Postgres and settlement."""

from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.test import Client
from prometheus_client import REGISTRY

from apps.accounts import organizations
from apps.accounts.keys import KeyTerms, create_key
from apps.accounts.models import AuditEvent, Membership, User
from apps.inference.cache import thresholds
from apps.inference.models import CacheGeneration, SemanticAccount
from tests.apps.conftest import Cast
from tests.apps.gateway.test_cache import CHAT, ask, chat, level, wait_usage

pytestmark = pytest.mark.django_db(transaction=True)


def browse(user: User) -> Client:
    browser = Client()
    browser.force_login(user)
    return browser


@pytest.mark.usefixtures("worker", "settling")
async def test_hits_and_savings_are_told_and_an_owner_forgets_the_answers(cast: Cast) -> None:
    base = f"/account/organizations/{cast.organization.public_id}/cache/"
    path = f"/api/v1/organizations/{cast.organization.public_id}/cache"
    browser = await sync_to_async(browse)(cast.user)
    _, manager = await sync_to_async(create_key)(cast.organization, cast.user, "m", KeyTerms(can_manage=True))
    program = Client(headers={"authorization": f"Bearer {manager}"})
    empty = await sync_to_async(browser.get)(base)
    assert empty.status_code == 200 and b"No answer came from the cache yet" in empty.content
    assert [level(await ask(cast.raw, chat())) for _ in range(3)] == ["miss", "l1", "l1"]
    rows = await wait_usage(3)
    saved = sum(row.saved_nanousd for row in rows)
    counted = REGISTRY.get_sample_value(
        "aiscale_cache_saved_nanousd_total", {"organization": cast.organization.public_id}
    )
    assert counted == saved > 0
    page = (await sync_to_async(browser.get)(base)).content.decode()
    assert "66.7 % of 3 requests" in page and "In the web server" in page
    report: Any = (await sync_to_async(program.get)(path)).json()
    assert report["levels"] == [{"level": "l1", "requests": 2, "saved_nanousd": saved}]
    assert (report["requests"], report["hits"], report["saved_nanousd"], report["semantic"]) == (3, 2, saved, None)
    done = await sync_to_async(browser.post)(f"{base}purge/", follow=True)
    assert b"are forgotten" in done.content
    assert [level(await ask(cast.raw, chat())) for _ in range(2)] == ["miss", "l1"]
    assert (await sync_to_async(program.delete)(path)).json()["purged"] is True
    assert level(await ask(cast.raw, chat())) == "miss"
    events = AuditEvent.objects.filter(action="cache.purge", target=f"organization:{cast.organization.public_id}")
    assert await events.acount() == 2


def test_the_semantic_part_says_errors_and_thresholds(cast: Cast) -> None:
    organizations.set_semantic_cache(cast.user, cast.organization, True)
    SemanticAccount.objects.create(organization_id=cast.organization.public_id, lookups=400.0, spent=2.0)
    base = f"/account/organizations/{cast.organization.public_id}/cache/"
    page = browse(cast.user).get(base).content.decode()
    assert "0.50 % of 400 questions expected, at most 2 %" in page and "first alike questions still go" in page
    _, manager = create_key(cast.organization, cast.user, "m", KeyTerms(can_manage=True))
    program = Client(headers={"authorization": f"Bearer {manager}"})
    semantic = program.get(f"/api/v1/organizations/{cast.organization.public_id}/cache").json()["semantic"]
    assert semantic["lookups"] == 400 and semantic["expected_wrong_percent"] == 0.5 and semantic["thresholds"] is None


def test_a_threshold_is_where_the_risk_fits_the_bound() -> None:
    prior = thresholds.make_prior()
    right, wrong = [(0.85, True)] * 40, [(0.9, False)] * 40
    eager, strict = (thresholds.find_threshold(seen, prior, 0.02) for seen in (right, wrong))
    assert eager is not None and eager <= 0.86
    assert strict is None or strict > 0.9
    assert thresholds.find_risk(eager, right, prior) <= thresholds.MOST_RISK * 0.02


@pytest.mark.parametrize(
    ("role", "sees", "may"), [("admin", 200, True), ("billing", 200, False), ("member", 403, False)]
)
def test_who_sees_it_and_who_forgets(cast: Cast, role: str, sees: int, may: bool) -> None:
    acme = organizations.create(cast.user, "Acme").organization
    user = User.objects.create_user(f"{role}@example.com")
    Membership.objects.create(user=user, organization=acme, role=role)
    base, browser = f"/account/organizations/{acme.public_id}/cache/", browse(user)
    page = browser.get(base)
    assert page.status_code == sees and (b"Forget all answers" in page.content) is may
    browser.post(f"{base}purge/")
    assert CacheGeneration.objects.filter(scope=f"organization:{acme.public_id}").exists() is may


def test_an_administrator_forgets_an_organizations_answers(cast: Cast) -> None:
    boss = User.objects.create_superuser("boss@example.com")
    browser = browse(boss)
    add = "/admin/inference/cachegeneration/add/"
    values = {"kind": "organization", "target": cast.user.email, "reason": "They asked"}
    page = browser.post(add, values, follow=True)
    scope = f"organization:{cast.organization.public_id}"
    assert page.status_code == 200 and scope.encode() in page.content
    assert CacheGeneration.objects.get(scope=scope).number == 1
    event = AuditEvent.objects.get(action="cache.purge")
    assert (event.target, event.reason) == (scope, "They asked")
    for kind, target in (("organization", "nobody"), ("model", "none"), ("model", ""), ("site", "x")):
        assert browser.post(add, values | {"kind": kind, "target": target}).status_code == 200
        assert CacheGeneration.objects.count() == 1, (kind, target)
    browser.post(add, values | {"kind": "model", "target": CHAT})
    browser.post(add, values | {"kind": "site", "target": ""})
    assert set(CacheGeneration.objects.values_list("scope", flat=True)) == {scope, f"model:{CHAT}", "site"}
