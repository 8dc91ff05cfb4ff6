"""The caller of a key is known from Redis, and from Postgres when Redis has forgotten."""

from datetime import timedelta

import pytest
from django.utils import timezone
from redis import Redis

from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from apps.accounts import callers, mirror
from apps.accounts.callers import on_thread
from apps.accounts.keys import create_key, hash_key, revoke_key
from apps.accounts.models import ApiKey, Plan, User
from apps.accounts.organizations import ensure_personal_organization
from tests.apps.conftest import Cast


async def refuse(raw: str) -> Code:
    with pytest.raises(AiscaleError) as refused:
        await callers.get_by_key(raw)
    return refused.value.code


async def test_a_key_names_its_caller(cast: Cast) -> None:
    assert await callers.get_by_key(cast.raw) == cast.caller


async def test_what_redis_forgot_comes_back_from_postgres(cast: Cast, redis_url: str) -> None:
    client = Redis.from_url(redis_url)
    client.flushall()
    assert await callers.get_by_key(cast.raw) == cast.caller
    client.delete(keys.organization(cast.organization.public_id))
    assert await callers.get_by_key(cast.raw) == cast.caller


async def test_a_wrong_key_asks_postgres_once(cast: Cast) -> None:
    wrong = "sk-aiscale-wrong"
    assert await refuse(wrong) is Code.INVALID_API_KEY
    # made in between: known only after the refusal has been forgotten
    await on_thread(lambda: ApiKey.objects.filter(pk=cast.key.pk).update(digest=hash_key(wrong)))
    assert await refuse(wrong) is Code.INVALID_API_KEY
    callers._unknown.clear()
    assert (await callers.get_by_key(wrong)).key_id == cast.key.public_id


async def test_keys_that_no_longer_work(cast: Cast) -> None:
    await on_thread(lambda: revoke_key(cast.key))
    assert await refuse(cast.raw) is Code.KEY_REVOKED

    def make_old() -> str:
        key, raw = create_key(cast.organization, cast.user)
        key.expires_at = timezone.now() - timedelta(seconds=1)
        key.save()
        return raw

    assert await refuse(await on_thread(make_old)) is Code.KEY_EXPIRED


async def test_a_user_who_is_shut_out_has_no_session_caller(cast: Cast) -> None:
    assert (await callers.get_by_user(cast.user.public_id)).organization_id == cast.organization.public_id
    await on_thread(lambda: User.objects.update(is_active=False))
    with pytest.raises(AiscaleError) as refused:
        await callers.get_by_user(cast.user.public_id)
    assert refused.value.code is Code.ACCOUNT_INACTIVE


async def test_a_plan_is_known_with_its_limits(cast: Cast) -> None:
    plan = await callers.get_plan("free")
    assert (plan.requests_per_window, plan.window_s, plan.max_in_flight) == (20, 3600, 2)
    assert plan.allows("anything")
    await on_thread(lambda: Plan.objects.filter(slug="free").update(allowed_models=["one"]))
    callers._plans.clear()
    plan = await callers.get_plan("free")
    assert plan.allows("one") and not plan.allows("two")


def test_a_change_reaches_the_mirror_at_once_and_heals_later(cast: Cast, redis_url: str) -> None:
    client = Redis.from_url(redis_url)
    name = keys.organization(cast.organization.public_id)
    cast.organization.is_active = False
    cast.organization.save()
    assert client.hget(name, "state") == b"suspended"
    client.hset(name, "state", "active")
    mirror.publish_all()
    assert client.hget(name, "state") == b"suspended"


def test_personal_organizations_are_made_once(cast: Cast) -> None:
    user = User.objects.create_user("Bob@Example.com")
    first, second = ensure_personal_organization(user), ensure_personal_organization(user)
    assert user.email == "bob@example.com" and first.pk == second.pk
    assert first.plan.slug == "free" and first.memberships.get().role == "owner"
