"""The commands that make plans, keys and the first administrator."""

from io import StringIO

import pytest
from django.core.management import CommandError, call_command

from apps.accounts import organizations
from apps.accounts.callers import hash_key
from apps.accounts.models import ApiKey, AuditEvent, Plan, User
from tests.apps.conftest import Cast


def run(name: str, /, **options: object) -> str:
    output = StringIO()
    call_command(name, stdout=output, **options)
    return output.getvalue()


def test_create_api_key_prints_the_key_alone(cast: Cast) -> None:
    printed = run("create_api_key", email="New@Example.com", plan="pro")
    raw = printed.strip()
    assert printed == raw + "\n" and raw.startswith("sk-aiscale-") and len(raw) == 54
    key = ApiKey.objects.get(digest=hash_key(raw))
    assert key.created_by.email == "new@example.com" and not key.created_by.has_usable_password()
    assert key.organization.plan.slug == "pro" and key.hint == raw[-4:]
    run("create_api_key", email="new@example.com")
    assert User.objects.filter(email="new@example.com").count() == 1
    assert ApiKey.objects.filter(created_by=key.created_by).count() == 2
    key.organization.refresh_from_db()
    assert key.organization.plan.slug == "pro"


def test_create_api_key_for_an_organization_and_with_limits(cast: Cast) -> None:
    acme = organizations.create(cast.user, "Acme").organization
    options = {"email": "ADA@example.com", "organization": acme.public_id, "plan": "pro", "name": "CI", "manage": True}
    limits = {"expires": "90d", "models": "one, two", "requests": 10, "tokens_per_minute": 500, "max_in_flight": 3}
    key = ApiKey.objects.get(digest=hash_key(run("create_api_key", **options, **limits).strip()))
    assert key.organization == acme and key.created_by == cast.user and key.can_manage
    assert (key.requests_per_window, key.window_s, key.tokens_per_minute, key.max_in_flight) == (10, 60, 500, 3)
    assert key.allowed_models == ["one", "two"] and key.expires_at is not None
    acme.refresh_from_db()
    assert acme.plan.slug == "pro" and cast.organization.plan.slug == "enterprise"
    assert AuditEvent.objects.get(action="key.create", target=f"key:{key.public_id}").actor_kind == "command"


@pytest.mark.parametrize(
    "options",
    [
        {"email": "nobody"},
        {"email": "x@example.com", "plan": "gold"},
        {"email": "x@example.com", "organization": "org_nope"},
        {"email": "new@example.com", "organization": "shared"},
        {"email": "stranger@example.com", "organization": "shared"},
        {"email": "x@example.com", "expires": "yesterday"},
        {"email": "x@example.com", "expires": "2020-01-01"},
        {"email": "x@example.com", "window": 5},
        {"email": "x@example.com", "requests": 0},
    ],
)
def test_create_api_key_refuses_clearly(cast: Cast, options: dict[str, object]) -> None:
    User.objects.create_user("stranger@example.com")
    if options.get("organization") == "shared":
        options = options | {"organization": organizations.create(cast.user, "Acme").organization.public_id}
    with pytest.raises(CommandError):
        run("create_api_key", **options)
    assert User.objects.count() == 2 and ApiKey.objects.count() == 1


def test_ensure_admin_makes_one_and_says_the_password_once(cast: Cast) -> None:
    password = run("ensure_admin", email="admin@localhost").strip()
    admin = User.objects.get(email="admin@localhost")
    assert len(password) >= 12 and admin.check_password(password)
    assert admin.is_superuser and admin.is_staff
    assert run("ensure_admin", email="other@localhost") == ""
    assert User.objects.filter(is_superuser=True).count() == 1


def test_seed_plans_keeps_what_an_owner_changed(cast: Cast) -> None:
    seeded = {p.slug: (p.requests_per_window, p.window_s) for p in Plan.objects.all()}
    assert seeded == {"free": (20, 3600), "pro": (60, 60), "enterprise": (500, 60)}
    Plan.objects.filter(slug="free").update(requests_per_window=7)
    Plan.objects.filter(slug="pro").delete()
    run("seed_plans")
    assert Plan.objects.get(slug="free").requests_per_window == 7
    assert Plan.objects.get(slug="pro").requests_per_window == 60
