"""Who may do what in an organization, and that it always has an owner."""

import threading
from collections.abc import Callable

import pytest
from django.db import IntegrityError, connection, transaction
from redis import Redis

from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys as names
from apps.accounts import members, organizations, roles
from apps.accounts.keys import create_member_key
from apps.accounts.models import ApiKey, AuditEvent, Membership, Organization, User
from apps.accounts.roles import Right, Role
from tests.apps.conftest import Cast


def refuse(work: Callable[[], object]) -> Code:
    with pytest.raises(AiscaleError) as refused:
        work()
    assert len(refused.value.message) > 20
    return refused.value.code


class Company:
    """Hold an organization with one member of each role, and a stranger."""

    def __init__(self) -> None:
        self.owner = User.objects.create_user("owner@example.com")
        self.organization = organizations.create(self.owner, "Acme").organization
        self.admin, self.member, self.billing = (self.add(role) for role in ("admin", "member", "billing"))
        self.stranger = User.objects.create_user("stranger@example.com")

    def add(self, role: str, name: str = "") -> User:
        user = User.objects.create_user(f"{name or role}@example.com")
        Membership.objects.create(user=user, organization=self.organization, role=role)
        return user

    def place(self, user: User) -> Membership:
        return Membership.objects.get(user=user, organization=self.organization)

    def id_of(self, user: User) -> str:
        return self.place(user).public_id


@pytest.fixture
def acme(cast: Cast) -> Company:
    return Company()


def test_the_table_is_whole() -> None:
    assert set(roles.TABLE) == set(Right) and set(roles.DESCRIPTIONS) == set(Role)
    assert all(Role.OWNER in able for able in roles.TABLE.values())


def test_admins_touch_everybody_but_owners() -> None:
    assert roles.list_grantable("owner") == list(Role)
    assert roles.list_grantable("admin") == [Role.ADMIN, Role.MEMBER, Role.BILLING]
    assert roles.list_grantable("member") == roles.list_grantable("billing") == []


def test_who_makes_an_organization_owns_it(cast: Cast) -> None:
    place = organizations.create(cast.user, "  Acme   Tools ")
    assert place.role == "owner" and place.organization.name == "Acme Tools"
    assert place.organization.plan.slug == "free"
    assert [each.organization.display_name for each in organizations.list_memberships(cast.user)] == [
        "Personal",
        "Acme Tools",
    ]


@pytest.mark.parametrize("name", ["", "   ", "x" * 121, "a\x00b", "Win at http://evil.example", "a\u202eb"])
def test_bad_names_are_refused(cast: Cast, name: str) -> None:
    assert refuse(lambda: organizations.create(cast.user, name)) is Code.INVALID_REQUEST
    assert Organization.objects.count() == 1


def test_nobody_multiplies_the_free_plan(cast: Cast) -> None:
    for number in range(organizations.MAX_OWNED):
        organizations.create(cast.user, f"Acme {number}")
    assert refuse(lambda: organizations.create(cast.user, "One more")) is Code.TOO_MANY_OBJECTS


def test_roles_change_within_ones_own_rank(acme: Company) -> None:
    change = members.change_role
    change(acme.admin, acme.organization, acme.id_of(acme.member), "billing")
    assert acme.place(acme.member).role == "billing"
    for by, whom, role, code in (
        (acme.admin, acme.owner, "member", Code.PERMISSION_DENIED),
        (acme.admin, acme.member, "owner", Code.PERMISSION_DENIED),
        (acme.member, acme.billing, "member", Code.PERMISSION_DENIED),
        (acme.billing, acme.billing, "owner", Code.PERMISSION_DENIED),
        (acme.stranger, acme.member, "member", Code.NOT_FOUND),
        (acme.owner, acme.owner, "member", Code.LAST_OWNER),
        (acme.owner, acme.member, "emperor", Code.INVALID_REQUEST),
    ):
        assert refuse(lambda: change(by, acme.organization, acme.id_of(whom), role)) is code, (by, whom, role)  # noqa: B023
    assert refuse(lambda: change(acme.owner, acme.organization, "mem_\x00", "member")) is Code.NOT_FOUND
    event = AuditEvent.objects.get(action="member.role")
    assert event.details == {"email": "member@example.com", "before": "member", "after": "billing"}
    assert (event.actor, event.organization_id) == ("admin@example.com", acme.organization.public_id)


def test_who_was_removed_a_moment_ago_changes_nothing(acme: Company) -> None:
    members.remove(acme.owner, acme.organization, acme.id_of(acme.admin))
    work = lambda: members.remove(acme.admin, acme.organization, acme.id_of(acme.member))  # noqa: E731
    assert refuse(work) is Code.NOT_FOUND


def test_removing_somebody_ends_their_keys_of_this_organization_alone(acme: Company, redis_url: str) -> None:
    key, _ = create_member_key(acme.organization, acme.member, "here")
    personal = organizations.ensure_personal_organization(acme.member)
    elsewhere, _ = create_member_key(personal, acme.member, "elsewhere")
    colleague, _ = create_member_key(acme.organization, acme.admin, "of a colleague")
    members.remove(acme.admin, acme.organization, acme.id_of(acme.member))
    client = Redis.from_url(redis_url)
    states = [client.hget(names.api_key(each.digest), "state") for each in (key, elsewhere, colleague)]
    assert states == [b"revoked", b"active", b"active"]
    assert not Membership.objects.filter(user=acme.member, organization=acme.organization).exists()
    assert [event.action for event in AuditEvent.objects.all()[:2]] == ["key.revoke", "member.remove"]


def test_a_role_without_keys_loses_them(acme: Company) -> None:
    key, _ = create_member_key(acme.organization, acme.member)
    members.change_role(acme.owner, acme.organization, acme.id_of(acme.member), "billing")
    key.refresh_from_db()
    assert key.state == "revoked"
    assert refuse(lambda: create_member_key(acme.organization, acme.member)) is Code.PERMISSION_DENIED
    assert refuse(lambda: create_member_key(acme.organization, acme.stranger)) is Code.NOT_FOUND


def test_who_may_remove_whom(acme: Company) -> None:
    remove = members.remove
    for by, whom, code in (
        (acme.admin, acme.owner, Code.PERMISSION_DENIED),
        (acme.member, acme.billing, Code.PERMISSION_DENIED),
        (acme.owner, acme.owner, Code.INVALID_REQUEST),
        (acme.stranger, acme.member, Code.NOT_FOUND),
    ):
        assert refuse(lambda: remove(by, acme.organization, acme.id_of(whom))) is code, (by, whom)  # noqa: B023
    members.leave(acme.billing, acme.organization)
    assert refuse(lambda: members.leave(acme.owner, acme.organization)) is Code.LAST_OWNER
    assert refuse(lambda: members.leave(acme.stranger, acme.organization)) is Code.NOT_FOUND


def test_ownership_is_handed_over(acme: Company) -> None:
    transfer = members.transfer
    assert refuse(lambda: transfer(acme.admin, acme.organization, acme.id_of(acme.admin))) is Code.PERMISSION_DENIED
    assert refuse(lambda: transfer(acme.owner, acme.organization, acme.id_of(acme.owner))) is Code.INVALID_REQUEST
    transfer(acme.owner, acme.organization, acme.id_of(acme.billing))
    assert (acme.place(acme.owner).role, acme.place(acme.billing).role) == ("admin", "owner")
    members.leave(acme.owner, acme.organization)


def test_the_personal_organization_stays_as_it_is(cast: Cast) -> None:
    own = cast.organization
    place = own.memberships.get()
    for work in (
        lambda: organizations.rename(cast.user, own, "Ada"),
        lambda: organizations.delete(cast.user, own),
        lambda: members.leave(cast.user, own),
        lambda: members.transfer(cast.user, own, place.public_id),
        lambda: members.change_role(cast.user, own, place.public_id, "member"),
    ):
        assert refuse(work) is Code.INVALID_REQUEST


def test_a_deleted_organization_is_gone_for_its_members_and_the_gate(acme: Company, redis_url: str) -> None:
    key, _ = create_member_key(acme.organization, acme.member)
    assert refuse(lambda: organizations.delete(acme.admin, acme.organization)) is Code.PERMISSION_DENIED
    organizations.delete(acme.owner, acme.organization)
    assert refuse(lambda: organizations.delete(acme.owner, acme.organization)) is Code.NOT_FOUND
    assert organizations.find_membership(acme.owner, acme.organization.public_id) is None
    client = Redis.from_url(redis_url)
    assert client.hget(names.organization(acme.organization.public_id), "state") == b"suspended"
    assert client.hget(names.api_key(key.digest), "state") == b"revoked"
    assert Organization.objects.filter(pk=acme.organization.pk).exists(), "its ledger names it"


def in_parallel(*works: Callable[[], object]) -> list[object]:
    """Do all at once, each with a connection of its own; return what came out, or the error."""
    outcomes: list[object] = [None] * len(works)
    together = threading.Barrier(len(works))

    def run(index: int) -> None:
        try:
            together.wait(20)
            outcomes[index] = works[index]()
        except (AiscaleError, IntegrityError) as error:
            outcomes[index] = error
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes


def test_of_two_owners_who_leave_at_once_one_stays(acme: Company) -> None:
    for number in range(5):
        other = acme.add("owner", f"other{number}")
        outcomes = in_parallel(
            lambda: members.leave(acme.owner, acme.organization),
            lambda: members.leave(other, acme.organization),  # noqa: B023
        )
        refused = [each for each in outcomes if each is not None]
        assert len(refused) == 1 and isinstance(refused[0], AiscaleError) and refused[0].code is Code.LAST_OWNER
        stayed = Membership.objects.get(organization=acme.organization, role="owner")
        acme.owner = stayed.user


def test_the_database_keeps_an_owner_whoever_asks(acme: Company) -> None:
    place = acme.place(acme.owner)
    owners = Membership.objects.filter(pk=place.pk)
    for work in (owners.delete, lambda: owners.update(role="admin")):
        with pytest.raises(IntegrityError, match="needs an owner"), transaction.atomic():
            work()
    other = acme.place(acme.add("owner", "other"))

    def drop(pk: int) -> None:
        with transaction.atomic():
            Membership.objects.filter(pk=pk).delete()

    outcomes = in_parallel(lambda: drop(place.pk), lambda: drop(other.pk))
    assert sorted(isinstance(each, IntegrityError) for each in outcomes) == [False, True]
    assert Membership.objects.filter(organization=acme.organization, role="owner").count() == 1


def test_a_key_made_while_its_maker_is_removed_does_not_stay(acme: Company) -> None:
    for number in range(5):
        user = acme.add("member", f"m{number}")
        member_id = acme.id_of(user)
        in_parallel(
            lambda: create_member_key(acme.organization, user),  # noqa: B023
            lambda: members.remove(acme.owner, acme.organization, member_id),  # noqa: B023
        )
        assert not ApiKey.objects.filter(created_by=user, revoked_at=None).exists()
