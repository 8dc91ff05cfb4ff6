"""Every page of the admin opens, and none shows a secret."""

import html
from datetime import timedelta
from decimal import Decimal

import pytest
from django.apps import apps
from django.contrib import admin
from django.db import transaction
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from django.utils.html import strip_tags
from redis import Redis

from aiscale.wire import keys
from apps.accounts import audit, organizations
from apps.accounts.keys import create_key
from apps.accounts.membership_admin import NEW_ROWS
from apps.accounts.models import AuditEvent, Membership, Organization, Plan, User
from apps.chat import turns
from apps.inference.cache import generations
from apps.inference.models import Model, ModerationFlag, Upstream
from apps.spend import killswitch, prices, rerating, settlement, webhooks
from apps.spend.models import Budget, KillSwitch, RefusedRequest
from tests.apps.conftest import Cast
from tests.apps.spend.cast import ADA, make_finished

MODELS = [
    model for model in admin.site._registry if model._meta.app_label in ("accounts", "spend", "inference", "chat")
]


@pytest.fixture
def browser(cast: Cast) -> Client:
    """The administrator, in an installation where something has happened."""
    Budget.objects.create(
        scope=f"organization:{cast.organization.public_id}", limit_nanousd=100, thresholds=["50%"], period="monthly"
    )
    webhooks.make_endpoint("https://hooks.example/in", cast.organization)
    settlement.settle(make_finished(cast.organization.public_id))
    killswitch.trip("model:old", reason="Retired", by=ADA)
    turns._begin(cast.user.public_id, None, "smollm2-135m-instruct", "A private question", "c1")
    root = User.objects.create_superuser("root@example.com", "x")
    now = timezone.now()
    terms = prices.terms_of(prices.map_current()["smollm2-135m-instruct"])
    order = rerating.Order("smollm2-135m-instruct", now - timedelta(hours=1), now, terms)
    rerating.order(order, reason="Wrong", by=audit.by_user(root))
    RefusedRequest.objects.create(request_id="req_1", source="api", code="killed", message="Stopped.", occurred_at=now)
    ModerationFlag.objects.create(organization_id="org_1", request_id="req_1", source="api", model="m", action="flag")
    with transaction.atomic():
        audit.record("plan.change", target="plan:free", by=audit.by_user(root))
    generations.purge(f"organization:{cast.organization.public_id}", by=audit.by_user(root), reason="A test")
    upstream = Upstream(name="acme", base_url="https://api.acme.example/v1")
    upstream.set_key("sk-upstream-secret")
    upstream.save()
    browser = Client()
    browser.force_login(root)
    return browser


def test_everything_an_owner_needs_is_there() -> None:
    names = {model.__name__ for model in MODELS}
    assert names >= {
        "User",
        "Organization",
        "Plan",
        "ApiKey",
        "Model",
        "Conversation",
        "UsageRecord",
        "Budget",
        "KillSwitch",
        "Price",
    }


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_pages_open_and_show_no_secret(browser: Client, cast: Cast, model: type) -> None:
    place = f"admin:{model._meta.app_label}_{model._meta.model_name}"  # type: ignore[attr-defined]
    rows = apps.get_model(model._meta.label).objects.all()  # type: ignore[attr-defined]
    assert rows.exists(), "a list without rows shows nothing"
    urls = [reverse(f"{place}_changelist"), reverse(f"{place}_change", args=[rows.first().pk])]
    for url in [*urls, reverse(f"{place}_changelist") + "?q=a"]:
        page = browser.get(url)
        assert page.status_code == 200, url
        text = page.content.decode()
        for secret in (cast.key.digest, cast.raw, cast.user.password.split("$")[-1], "A private question"):
            assert secret not in text, url
        # money is shown in US dollars: no field has the database's unit for a label
        assert "nanousd" not in strip_tags(text), url
    assert browser.get(reverse(f"{place}_add")).status_code in (200, 403)


def test_money_in_the_audit_log_and_behind_refusals_is_in_dollars(browser: Client, cast: Cast) -> None:
    details = {
        "changed": {"limit_nanousd": {"from": None, "to": 1_500_000_000}},
        "count": 7,
    }
    with transaction.atomic():
        event = audit.record("budget.change", target="budget:1", by=ADA, details=details)
    page = browser.get(reverse("admin:accounts_auditevent_change", args=[event.pk])).content.decode()
    text = html.unescape(strip_tags(page))
    assert "Changed, limit: none → $1.50" in text and "1500000000" not in text
    assert "Count: 7" in text
    refused = RefusedRequest.objects.create(
        request_id="req_money",
        source="api",
        code="insufficient_quota",
        message="No",
        facts={"limit_nanousd": "1000000000", "retry_ms": "61000"},
        occurred_at=timezone.now(),
    )
    page = browser.get(reverse("admin:spend_refusedrequest_change", args=[refused.pk])).content.decode()
    assert "Limit: $1.00" in page and "Try again in: 1m1s" in page and "1000000000" not in page


@pytest.mark.parametrize("odd", ["\0", "abc", "9" * 30, "1e309"])
def test_what_is_chosen_by_search_bears_any_value(browser: Client, cast: Cast, odd: str) -> None:
    url = reverse("admin:spend_webhookendpoint_add")
    page = browser.post(url, {"url": "https://hooks.example/other", "organization": odd})
    assert page.status_code == 200 and "errorlist" in page.content.decode()
    page = browser.post(
        reverse("admin:accounts_user_change", args=[cast.user.pk]), {"email": cast.user.email, "user_permissions": odd}
    )
    assert page.status_code == 200 and "errorlist" in page.content.decode()


@pytest.mark.parametrize(
    "names", ['["\\u0000"]', '["\\ud800"]', '["a,b"]', '[""]', "[1]", "{}", '["' + "x" * 129 + '"]']
)
def test_a_key_is_kept_to_names_that_a_model_can_have(browser: Client, cast: Cast, names: str) -> None:
    url = reverse("admin:accounts_apikey_change", args=[cast.key.pk])
    page = browser.post(url, {"name": "Mine", "allowed_models": names})
    assert page.status_code == 200 and "errorlist" in page.content.decode()
    cast.key.refresh_from_db()
    assert cast.key.allowed_models == []


def test_no_number_of_rows_keeps_the_server_busy(browser: Client, cast: Cast) -> None:
    forms = {"memberships-INITIAL_FORMS": "0", "invitations-INITIAL_FORMS": "0", "invitations-TOTAL_FORMS": "9" * 20}
    values = forms | {"memberships-TOTAL_FORMS": "9" * 20, "name": ""}
    page = browser.post(reverse("admin:accounts_organization_change", args=[cast.organization.pk]), values)
    assert page.status_code == 200
    rows = [len(each.formset.forms) for each in page.context["inline_admin_formsets"]]
    assert rows == [NEW_ROWS + 1, NEW_ROWS]
    people = {"memberships-TOTAL_FORMS": "9" * 20, "memberships-INITIAL_FORMS": "0", "email": ""}
    page = browser.post(reverse("admin:accounts_user_change", args=[cast.user.pk]), people)
    assert [len(each.formset.forms) for each in page.context["inline_admin_formsets"]] == [NEW_ROWS + 1]


def test_nobody_takes_their_own_rights_away(browser: Client, cast: Cast) -> None:
    root = User.objects.get(email="root@example.com")
    other = User.objects.create_superuser("other@example.com", "x")
    forms = {"memberships-TOTAL_FORMS": "0", "memberships-INITIAL_FORMS": "0"}
    for user in (root, other):
        page = browser.post(reverse("admin:accounts_user_change", args=[user.pk]), forms | {"email": user.email})
        assert page.status_code == 302, page.content.decode()[-3000:]
        user.refresh_from_db()
    assert root.is_active and root.is_staff and root.is_superuser
    assert not (other.is_active or other.is_staff or other.is_superuser)


def test_who_paid_is_never_deleted(browser: Client, cast: Cast) -> None:
    for place, pk in (("user", cast.user.pk), ("organization", cast.organization.pk), ("apikey", cast.key.pk)):
        assert browser.post(reverse(f"admin:accounts_{place}_delete", args=[pk]), {"post": "yes"}).status_code == 403
    assert User.objects.filter(pk=cast.user.pk).exists()


def test_the_login_is_everybodys(cast: Cast) -> None:
    browser = Client()
    assert browser.get("/admin/", follow=True).redirect_chain[-1][0] == "/accounts/login/?next=%2Fadmin%2F"
    browser.force_login(cast.user)
    assert browser.get("/admin/login/").status_code == 403


def test_only_staff_gets_in(cast: Cast) -> None:
    browser = Client()
    browser.force_login(cast.user)
    for path in ("/admin/", "/admin/accounts/user/", "/admin/spend/killswitch/"):
        assert browser.get(path).status_code == 302


def test_shutting_a_user_out_shuts_out_their_keys(browser: Client, cast: Cast, redis_url: str) -> None:
    url = reverse("admin:accounts_user_change", args=[cast.user.pk])
    values = {
        "email": cast.user.email,
        "memberships-TOTAL_FORMS": 0,
        "memberships-INITIAL_FORMS": 0,
    }
    assert browser.post(url, values).status_code == 302
    cast.user.refresh_from_db()
    assert not cast.user.is_active
    assert Redis.from_url(redis_url).hget(keys.api_key(cast.key.digest), "state") == b"revoked"


def test_a_kill_switch_is_released_from_its_page(browser: Client) -> None:
    switch = KillSwitch.objects.get()
    page = reverse("admin:spend_killswitch_change", args=[switch.pk])
    release = reverse("admin:spend_killswitch_release", args=[switch.pk])
    assert f'href="{release}"' in browser.get(page).content.decode()
    assert browser.post(release, {"reason": "Over"}).status_code == 302
    assert f'href="{release}"' not in browser.get(page).content.decode()


def test_keys_are_revoked_from_their_list(browser: Client, cast: Cast) -> None:
    values = {"action": "revoke_selected", "_selected_action": [cast.key.pk]}
    assert browser.post(reverse("admin:accounts_apikey_changelist"), values).status_code == 302
    cast.key.refresh_from_db()
    assert cast.key.state == "revoked"


def test_a_change_of_a_key_is_audited(browser: Client, cast: Cast, redis_url: str) -> None:
    values = {"name": "Site", "allowed_models": "[]", "max_in_flight": "3"}
    assert browser.post(reverse("admin:accounts_apikey_change", args=[cast.key.pk]), values).status_code == 302
    event = AuditEvent.objects.get(action="key.change", target=f"key:{cast.key.public_id}")
    assert event.details["changed"]["max_in_flight"] == {"from": None, "to": 3}
    assert event.organization_id == cast.organization.public_id
    assert Redis.from_url(redis_url).hget(keys.api_key(cast.key.digest), "max_in_flight") == b"3"


def test_a_plans_money_is_in_dollars_and_reaches_the_gate(browser: Client, cast: Cast, redis_url: str) -> None:
    plan = Plan.objects.get(slug="free")
    url = reverse("admin:accounts_plan_change", args=[plan.pk])
    assert b'value="1"' in browser.get(url).content
    values = {
        "name": "Free",
        "requests_per_window": 5,
        "window_s": 60,
        "max_in_flight": 1,
        "monthly_limit_nanousd": "2.5",
        "allowed_models": '["smollm2-135m-instruct"]',
        "tokens_per_minute": "",
        "max_output_tokens": 10,
        "cache_scope": "organization",
        "cached_price_percent": "25",
        "priority": 9,
        "weight": 2,
        "moderation": "flag",
        "max_queued": 7,
    }
    assert browser.post(url, values | {"monthly_limit_nanousd": "-1"}).status_code == 200
    assert browser.post(url, values | {"allowed_models": '{"a": 1}'}).status_code == 200
    for impossible in ({"tokens_per_minute": "0"}, {"context_tokens": "10"}, {"monthly_included_nanousd": "2.6"}):
        assert browser.post(url, values | impossible).status_code == 200, impossible
    assert browser.post(url, values).status_code == 302
    plan.refresh_from_db()
    assert plan.monthly_limit_nanousd == Decimal("2.5") * 10**9
    assert "no limit" in browser.get(reverse("admin:accounts_plan_changelist")).content.decode()
    mirrored = Redis.from_url(redis_url).hgetall(keys.plan("free"))
    assert mirrored[b"max_queued"] == b"7" and mirrored[b"tokens_per_minute"] == b""  # type: ignore[index]
    assert mirrored[b"requests_per_window"] == b"5" and mirrored[b"models"] == b"smollm2-135m-instruct"  # type: ignore[index]
    few = browser.post(url, values | {"tokens_per_minute": "1000", "max_output_tokens": 1000}, follow=True)
    assert "1,000 tokens a minute have no room for an answer of 1,000" in few.content.decode()
    enough = browser.post(url, values | {"tokens_per_minute": "2000", "max_output_tokens": 1000}, follow=True)
    assert "have no room" not in enough.content.decode()


def test_a_models_price_is_in_dollars_a_million(browser: Client) -> None:
    model = Model.objects.get(slug="smollm2-135m-instruct")
    page = browser.get(reverse("admin:inference_model_change", args=[model.pk])).content.decode()
    assert "0.05" in page and f"{reverse('admin:spend_price_add')}?model={model.slug}" in page
    page = browser.get(reverse("admin:inference_model_changelist")).content.decode()
    assert "0.05" in page and "0.2" in page


def test_an_organization_moves_to_another_plan(browser: Client, cast: Cast, redis_url: str) -> None:
    pro = Plan.objects.get(slug="pro")
    url = reverse("admin:accounts_organization_change", args=[cast.organization.pk])
    values = {"name": "Ada's", "plan": pro.pk, "semantic_max_error_percent": "2.0"}
    for inline in ("memberships", "invitations"):
        values |= {f"{inline}-TOTAL_FORMS": 0, f"{inline}-INITIAL_FORMS": 0}
    assert browser.post(url, values | {"is_active": "on"}).status_code == 302
    assert Organization.objects.get(pk=cast.organization.pk).plan == pro
    assert Redis.from_url(redis_url).hget(keys.organization(cast.organization.public_id), "plan") == b"pro"


def test_members_change_in_the_admin_as_on_the_pages(browser: Client, cast: Cast) -> None:
    place = organizations.create(cast.user, "Acme")
    bob = User.objects.create_user("bob@example.com")
    member = Membership.objects.create(user=bob, organization=place.organization, role="member")
    key, _ = create_key(place.organization, bob)
    url = reverse("admin:accounts_organization_change", args=[place.organization.pk])
    values = {
        "name": "Acme",
        "semantic_max_error_percent": "2.0",
        "plan": place.organization.plan_id,
        "is_active": "on",
        "memberships-TOTAL_FORMS": 2,
    }
    values |= {"memberships-INITIAL_FORMS": 2, "invitations-TOTAL_FORMS": 0, "invitations-INITIAL_FORMS": 0}
    for number, (row, role) in enumerate(((place, "owner"), (member, "member"))):
        for name, value in (("id", row.pk), ("organization", place.organization.pk), ("user", row.user_id)):
            values[f"memberships-{number}-{name}"] = value
        values[f"memberships-{number}-role"] = role
    # two members, and the empty row that another one is made from
    assert browser.get(url).content.decode().count('aria-label="Role"') == 3
    for last_owner in ({"memberships-0-role": "admin"}, {"memberships-0-DELETE": "on"}):
        page = browser.post(url, values | last_owner)
        assert page.status_code == 200 and b"An organization needs an owner" in page.content
    assert browser.post(url, values | {"memberships-0-role": "admin", "memberships-1-role": "owner"}).status_code == 302
    assert browser.post(url, values | {"memberships-0-role": "owner", "memberships-1-DELETE": "on"}).status_code == 302
    key.refresh_from_db()
    assert key.state == "revoked"
    actions = list(AuditEvent.objects.filter(target=f"user:{bob.public_id}").values_list("action", flat=True))
    assert actions == ["member.remove", "member.role"]


def test_an_owner_adds_an_upstream_and_a_model_of_it(browser: Client) -> None:
    page = browser.get("/admin/inference/upstream/add/")
    assert page.status_code == 200 and b"password" in page.content
    values = {
        "name": "other",
        "base_url": "https://other.example/v1",
        "key": "sk-of-other",
        "timeout_s": 60,
        "retries": 2,
    }
    assert browser.post("/admin/inference/upstream/add/", values | {"is_enabled": "on"}).status_code == 302
    upstream = Upstream.objects.get(name="other")
    assert upstream.sealed_key and "sk-of-other" not in upstream.sealed_key
    page = browser.get(f"/admin/inference/upstream/{upstream.pk}/change/")
    assert b"sk-of-other" not in page.content and upstream.sealed_key.encode() not in page.content
    for url in ("http://127.0.0.1:1/v1", "http://localhost/v1", "http://10.1.2.3/v1", "https://user:pw@x.example/v1"):
        refused = browser.post("/admin/inference/upstream/add/", values | {"name": "bad", "base_url": url})
        assert refused.status_code == 200 and not Upstream.objects.filter(name="bad").exists(), url
    model = {
        "slug": "other-large",
        "name": "Other",
        "upstream": upstream.pk,
        "kind": "generate",
        "dimensions": 0,
        "upstream_model": "large",
        "context_tokens": 8192,
    }
    assert browser.post("/admin/inference/model/add/", model | {"upstream_model": ""}).status_code == 200
    assert browser.post("/admin/inference/model/add/", model).status_code == 302
    added = Model.objects.get(slug="other-large")
    assert (added.kind, added.upstream) == ("generate", upstream)
    embedder = model | {"slug": "acme-embed", "kind": "embed", "dimensions": 3}
    assert browser.post("/admin/inference/model/add/", embedder | {"kind": "classify"}).status_code == 200
    assert browser.post("/admin/inference/model/add/", embedder).status_code == 302
    local = Model.objects.get(slug="smollm2-135m-instruct")
    page = browser.get(f"/admin/inference/model/{local.pk}/change/")
    assert b"other-large" in page.content and page.status_code == 200
    changed = {"name": local.name, "description": "", "is_enabled": "on", "fallback": added.pk}
    assert browser.post(f"/admin/inference/model/{local.pk}/change/", changed).status_code == 302
    assert Model.objects.get(slug=local.slug).fallback == added
