"""Programs manage organizations over /api/v1/organizations: with a key that may, or in a browser's session."""

import json
import time
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.http import HttpResponse
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from apps.accounts import api_shapes, mail, organizations
from apps.accounts.keys import KeyTerms, create_key
from apps.accounts.models import ApiKey, AuditEvent, Membership, Organization, User
from apps.gateway.reference import document
from tests.apps.conftest import Cast

ROOT = "/api/v1/organizations"


class Program:
    """Call the API with a key."""

    def __init__(self, raw: str) -> None:
        self.client, self.headers = Client(), {"Authorization": f"Bearer {raw}"}

    def ask(self, method: str, path: str, value: Any = None) -> HttpResponse:
        body = b"" if value is None else json.dumps(value)
        return self.client.generic(method, f"{ROOT}{path}", body, "application/json", headers=self.headers)

    def tell(self, method: str, path: str, value: Any = None, status: int = 200) -> Any:
        response = self.ask(method, path, value)
        assert response.status_code == status, response.content
        return response.json()


@pytest.fixture
def acme(cast: Cast) -> Organization:
    return organizations.create(cast.user, "Acme").organization


@pytest.fixture
def program(cast: Cast, acme: Organization) -> Program:
    return Program(create_key(acme, cast.user, "management", KeyTerms(can_manage=True))[1])


def add(organization: Organization, role: str, email: str = "") -> User:
    user = User.objects.create_user(email or f"{role}@example.com")
    Membership.objects.create(user=user, organization=organization, role=role)
    return user


def place(user: User, organization: Organization) -> Membership:
    return Membership.objects.get(user=user, organization=organization)


def has_shape(value: dict[str, Any], shape: type[Any]) -> bool:
    return set(value) == set(shape().fields)


def test_an_organization_is_shown_and_renamed(cast: Cast, acme: Organization, program: Program) -> None:
    listed = program.tell("GET", "")
    assert [each["id"] for each in listed["data"]] == [acme.public_id]
    one = program.tell("GET", f"/{acme.public_id}")
    assert one == listed["data"][0] and has_shape(one, api_shapes.OrganizationShape)
    assert (one["name"], one["role"], one["plan"], one["personal"]) == ("Acme", "owner", "free", False)
    assert program.tell("PATCH", f"/{acme.public_id}", {"name": " New  name "})["name"] == "New name"
    event = AuditEvent.objects.get(action="organization.rename")
    assert event.actor.startswith("ada@example.com (key …") and event.address == "127.0.0.1"


def test_members_over_the_api(cast: Cast, acme: Organization, program: Program) -> None:
    bob = add(acme, "member")
    base = f"/{acme.public_id}/members"
    listed = program.tell("GET", f"{base}?order=asc")
    assert [each["email"] for each in listed["data"]] == ["ada@example.com", "member@example.com"]
    one = program.tell("GET", f"{base}/{place(bob, acme).public_id}")
    assert one == listed["data"][1] and has_shape(one, api_shapes.MemberShape)
    first = program.tell("GET", f"{base}?limit=1&order=asc")
    assert first["has_more"] and len(first["data"]) == 1
    second = program.tell("GET", f"{base}?limit=1&order=asc&after={first['last_id']}")
    assert not second["has_more"] and second["data"][0]["id"] == one["id"]
    assert program.tell("PATCH", f"{base}/{one['id']}", {"role": "billing"})["role"] == "billing"
    assert program.tell("DELETE", f"{base}/{one['id']}")["deleted"] is True
    assert program.tell("GET", f"{base}/{one['id']}", status=404)["error"]["code"] == "not_found"
    last = program.tell("DELETE", f"{base}/{place(cast.user, acme).public_id}", status=409)
    assert last["error"]["code"] == "last_owner"


def test_invitations_over_the_api(cast: Cast, acme: Organization, program: Program) -> None:
    base = f"/{acme.public_id}/invitations"
    made = program.tell("POST", base, {"email": "New@Example.com", "role": "admin"}, 201)
    assert has_shape(made, api_shapes.InvitationShape)
    assert (made["email"], made["role"], made["status"]) == ("new@example.com", "admin", "pending")
    assert mail.send_due() == 1
    assert program.tell("GET", base)["data"] == [made]
    program.tell("POST", f"{base}/{made['id']}/resend")
    assert mail.send_due() == 1
    assert program.tell("DELETE", f"{base}/{made['id']}")["deleted"] is True
    assert program.tell("GET", base)["data"] == []
    assert "token" not in json.dumps(made) and ":" not in made["id"]


def test_keys_over_the_api(cast: Cast, acme: Organization, program: Program) -> None:
    base = f"/{acme.public_id}/keys"
    wanted = {"name": "CI", "expires_at": int(time.time()) + 3600, "allowed_models": ["one"], "max_in_flight": 2}
    made = program.tell("POST", base, wanted, 201)
    assert has_shape(made, api_shapes.NewKeyShape) and made["value"].startswith("sk-aiscale-")
    assert {name: made[name] for name in wanted} == wanted and made["owner"]["email"] == "ada@example.com"
    listed = program.tell("GET", base)["data"]
    assert len(listed) == 2 and all(has_shape(each, api_shapes.KeyShape) for each in listed)
    assert made["value"] not in json.dumps(listed)
    assert Program(made["value"]).tell("GET", "")["data"][0]["id"] == acme.public_id
    assert program.tell("DELETE", f"{base}/{made['id']}")["status"] == "revoked"
    assert program.tell("GET", f"{base}/{made['id']}")["status"] == "revoked"
    assert Program(made["value"]).tell("GET", "", status=401)["error"]["code"] == "key_revoked"


def test_a_key_is_changed_over_the_api(cast: Cast, acme: Organization, program: Program) -> None:
    base = f"/{acme.public_id}/keys"
    made = program.tell("POST", base, {"name": "CI", "max_in_flight": 2, "tokens_per_minute": 9}, 201)
    path, until = f"{base}/{made['id']}", int(time.time()) + 3600
    changed = program.tell("PATCH", path, {"max_in_flight": None, "monthly_limit_nanousd": 5, "expires_at": until})
    assert changed == program.tell("GET", path) and has_shape(changed, api_shapes.KeyShape)
    assert (changed["max_in_flight"], changed["monthly_limit_nanousd"], changed["expires_at"]) == (None, 5, until)
    assert (changed["name"], changed["tokens_per_minute"]) == ("CI", 9), "what is not named stays"
    assert program.tell("PATCH", path, {"monthly_limit_nanousd": None})["monthly_limit_nanousd"] is None
    for wrong in ({}, {"nope": 1}, {"can_manage": True}, {"window_s": 60}, {"max_in_flight": 0}, {"expires_at": 1}):
        assert program.tell("PATCH", path, wrong, 400)["error"]["code"] in ("invalid_request", "unknown_parameter"), (
            wrong
        )
    actor = AuditEvent.objects.filter(action="key.change").latest("pk").actor
    assert actor.startswith("ada@example.com (key …")
    program.tell("DELETE", path)
    assert "revoked" in program.tell("PATCH", path, {"name": "x"}, 400)["error"]["message"]


def test_no_key_widens_itself_or_another(cast: Cast, acme: Organization) -> None:
    limited, raw = create_key(acme, cast.user, "", KeyTerms(can_manage=True, max_in_flight=1))
    other = create_key(acme, cast.user)[0]
    for key in (limited, other):
        error = Program(raw).tell("PATCH", f"/{acme.public_id}/keys/{key.public_id}", {"max_in_flight": None}, 403)
        assert "limits of its own" in error["error"]["message"]
    assert ApiKey.objects.get(pk=limited.pk).max_in_flight == 1


def test_a_plain_key_manages_nothing(cast: Cast, acme: Organization) -> None:
    plain = Program(create_key(acme, cast.user)[1])
    assert plain.tell("GET", f"/{acme.public_id}")["id"] == acme.public_id
    for method, path, value in (
        ("PATCH", "", {"name": "x"}),
        ("DELETE", "", None),
        ("POST", "/transfer", {"member_id": "x"}),
        ("GET", "/members", None),
        ("GET", "/members/mem_x", None),
        ("PATCH", "/members/mem_x", {"role": "admin"}),
        ("DELETE", "/members/mem_x", None),
        ("GET", "/invitations", None),
        ("POST", "/invitations", {"email": "x@example.com"}),
        ("DELETE", "/invitations/inv_x", None),
        ("POST", "/invitations/inv_x/resend", None),
        ("GET", "/keys", None),
        ("POST", "/keys", {}),
        ("GET", "/keys/key_x", None),
        ("PATCH", "/keys/key_x", {"name": "x"}),
        ("DELETE", "/keys/key_x", None),
    ):
        error = plain.tell(method, f"/{acme.public_id}{path}", value, 403)["error"]
        assert error["code"] == "permission_denied", (method, path)
    assert ApiKey.objects.filter(organization=acme).count() == 1


def test_no_key_deletes_hands_over_or_reaches_elsewhere(cast: Cast, acme: Organization, program: Program) -> None:
    bob = add(acme, "member")
    for method, path, value in (
        ("POST", "", {"name": "Another"}),
        ("DELETE", f"/{acme.public_id}", None),
        ("POST", f"/{acme.public_id}/transfer", {"member_id": place(bob, acme).public_id}),
    ):
        assert "No key may do this" in program.tell(method, path, value, 403)["error"]["message"]
    # its maker is in their personal organization, too, and the key is not
    for path in ("", "/members", "/keys", "/invitations"):
        assert program.tell("GET", f"/{cast.organization.public_id}{path}", status=404)["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("own", "wanted", "status"),
    [
        ({}, {"can_manage": True}, 403),
        ({"max_in_flight": 1}, {}, 403),
        ({"allowed_models": ("one",)}, {}, 403),
        ({"allowed_models": ("one",)}, {"allowed_models": ["one", "two"]}, 403),
        ({"allowed_models": ("one",)}, {"allowed_models": ["one"]}, 201),
        ({"expires_at": timedelta(hours=1)}, {}, 403),
        ({"expires_at": timedelta(hours=1)}, {"expires_at": 2 * 3600}, 403),
        ({"expires_at": timedelta(hours=1)}, {"expires_at": 1800}, 201),
    ],
)
def test_a_key_makes_no_key_that_may_do_more(
    cast: Cast, acme: Organization, own: dict[str, Any], wanted: dict[str, Any], status: int
) -> None:
    if "expires_at" in own:
        own = own | {"expires_at": timezone.now() + own["expires_at"]}
    if "expires_at" in wanted:
        wanted = wanted | {"expires_at": int(time.time()) + wanted["expires_at"]}
    program = Program(create_key(acme, cast.user, "", KeyTerms(can_manage=True, **own))[1])
    program.tell("POST", f"/{acme.public_id}/keys", wanted, status)


def test_a_key_acts_with_its_makers_role_of_now(cast: Cast, acme: Organization) -> None:
    bob = add(acme, "admin")
    program = Program(create_key(acme, bob, "", KeyTerms(can_manage=True))[1])
    program.tell("POST", f"/{acme.public_id}/invitations", {"email": "x@example.com"}, 201)
    Membership.objects.filter(user=bob, organization=acme).update(role="member")
    error = program.tell("POST", f"/{acme.public_id}/invitations", {"email": "y@example.com"}, 403)["error"]
    assert "your role" in error["message"].lower() and error["type"] == "permission_error"
    Membership.objects.filter(user=bob, organization=acme).delete()
    program.tell("GET", f"/{acme.public_id}", status=404)


@pytest.mark.parametrize(
    ("method", "path", "value", "param"),
    [
        ("POST", "/invitations", {"email": "x"}, "email"),
        ("POST", "/invitations", {"email": 7}, "email"),
        ("POST", "/invitations", {"email": "x@example.com", "role": "emperor"}, "role"),
        ("POST", "/invitations", {"email": "x@example.com", "rule": "admin"}, "rule"),
        ("POST", "/invitations", [], None),
        ("POST", "/keys", {"name": "x" * 81}, "name"),
        ("POST", "/keys", {"name": "a\x00"}, "name"),
        ("POST", "/keys", {"expires_at": 1}, "expires_at"),
        ("POST", "/keys", {"expires_at": "soon"}, "expires_at"),
        ("POST", "/keys", {"expires_at": 10**30}, "expires_at"),
        ("POST", "/keys", {"max_in_flight": 0}, "max_in_flight"),
        ("POST", "/keys", {"requests_per_window": 5}, "window_s"),
        ("POST", "/keys", {"allowed_models": "one"}, "allowed_models"),
        ("POST", "/keys", {"allowed_models": ["a,b"]}, "allowed_models"),
        ("PATCH", "", {"name": ""}, "name"),
        ("PATCH", "", {"name": "x" * 121}, "name"),
        ("PATCH", "", {}, "name"),
        ("GET", "/members?limit=0", None, "limit"),
        ("GET", "/members?limit=x", None, "limit"),
        ("GET", "/keys?order=up", None, "order"),
    ],
)
def test_bad_input_is_refused_by_name(
    cast: Cast, acme: Organization, program: Program, method: str, path: str, value: Any, param: str | None
) -> None:
    error = program.tell(method, f"/{acme.public_id}{path}", value, 400)["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param) and len(error["message"]) > 10
    assert ApiKey.objects.filter(organization=acme).count() == 1 and not acme.invitations.exists()


def test_odd_ids_and_bodies(cast: Cast, acme: Organization, program: Program) -> None:
    for path in (
        "/%00",
        f"/{acme.public_id}x",
        f"/{acme.public_id}/members/%00",
        f"/{acme.public_id}/keys/%F0%9F%98%80",
    ):
        assert program.tell("GET", path, status=404)["error"]["code"] == "not_found"
    broken = program.client.generic(
        "POST", f"{ROOT}/{acme.public_id}/keys", "{", "application/json", headers=program.headers
    )
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
    assert program.tell("PUT", f"/{acme.public_id}", {"name": "x"}, 405)["error"]["type"] == "invalid_request_error"
    assert program.tell("GET", f"/{acme.public_id}/nothing", status=404)["error"]["code"] == "not_found"


def test_a_person_in_a_browser(cast: Cast, acme: Organization) -> None:
    browser = Client(enforce_csrf_checks=True)
    assert browser.get(ROOT).status_code == 401
    browser.force_login(cast.user)
    assert len(browser.get(ROOT).json()["data"]) == 2
    # another site's form carries the cookie and no token
    refused = browser.post(ROOT, {"name": "x"}, content_type="application/json")
    assert refused.status_code == 403 and Organization.objects.count() == 2
    browser = Client()
    browser.force_login(cast.user)
    made = browser.post(ROOT, {"name": "Third"}, content_type="application/json")
    assert made.status_code == 201
    bob = add(acme, "member")
    base = f"{ROOT}/{acme.public_id}"
    handed = browser.post(
        f"{base}/transfer", {"member_id": place(bob, acme).public_id}, content_type="application/json"
    )
    assert handed.json()["role"] == "owner" and place(cast.user, acme).role == "admin"
    assert browser.delete(base).status_code == 403
    assert browser.delete(f"{base}/members/{place(cast.user, acme).public_id}").status_code == 200
    assert browser.get(base).status_code == 404
    assert browser.delete(f"{ROOT}/{made.json()['id']}").json()["object"] == "organization.deleted"


def test_lists_ask_few_questions(cast: Cast, acme: Organization, program: Program) -> None:
    """D2: the number of queries does not depend on how much is listed."""
    counts = []
    for number in (1, 60):
        for n in range(number):
            bob = add(acme, "member", f"u{number}-{n}@example.com")
            create_key(acme, bob)
            acme.invitations.create(
                email=f"i{number}-{n}@example.com", expires_at=timezone.now() + timedelta(days=1), invited_by=bob
            )
        with CaptureQueriesContext(connection) as queries:
            for path in ("/members", "/invitations", "/keys"):
                assert program.tell("GET", f"/{acme.public_id}{path}?limit=100")["data"]
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 12


def test_the_document_names_every_route() -> None:
    paths = document.make_document()["paths"]
    ours = {path: set(item) for path, item in paths.items() if path.startswith(ROOT)}
    assert sum(len(methods) for methods in ours.values()) == 30, ours
    for path, item in paths.items():
        if path.startswith(ROOT):
            for operation in item.values():
                assert operation["summary"] and {"401", "403", "404", "429"} <= set(operation["responses"])
