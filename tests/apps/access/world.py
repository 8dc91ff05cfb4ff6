"""Make the world that the table speaks of: an organization with a member of each role, and everybody who is outside of it."""

import io
from datetime import timedelta

from django.conf import settings
from django.test import Client
from django.utils import timezone

from apps.accounts import invitations, organizations
from apps.accounts.keys import KeyTerms, create_key, revoke_key
from apps.accounts.models import Membership, User
from apps.chat import turns
from apps.chat.models import Message
from apps.gateway.files import keeping
from apps.gateway.models import Batch, StoredResponse
from apps.inference.models import ModerationFlag, Upstream
from apps.spend import killswitch, settlement, webhooks
from apps.spend.models import Budget, Rerating, SpendAlert
from apps.spend.refusal_models import RefusedRequest
from tests.apps.conftest import Cast
from tests.apps.spend.cast import ADA, USD, make_finished

PASSWORD = "correct horse 9 battery"
CHAT = "smollm2-135m-instruct"


class World:
    """Hold Acme, its people and keys, and a value for each name in a route.

    What routes name is the member's: their key, their conversation, their place in Acme. What ``/v1`` keeps is Acme's.
    """

    def __init__(self, stranger: Cast) -> None:
        self.cast = stranger
        self.browser = Client(raise_request_exception=False)
        self.users: dict[str, User] = {"stranger": stranger.user}
        for name in ("owner", "admin", "member", "billing", "removed"):
            self.users[name] = User.objects.create_user(f"{name}@example.com", PASSWORD)
        self.users["staff"] = User.objects.create_user("staff@example.com", PASSWORD, is_staff=True)
        self.users["superuser"] = User.objects.create_superuser("superuser@example.com", PASSWORD)
        self.acme = organizations.create(self.users["owner"], "Acme").organization
        for name, role in (("admin", "admin"), ("member", "member"), ("billing", "billing"), ("removed", "member")):
            Membership.objects.create(user=self.users[name], organization=self.acme, role=role)
        self.conversation_id, self.message_id = self._talk("member")
        self.removed_conversation_id, self.removed_message_id = self._talk("removed")
        Membership.objects.filter(user=self.users["removed"]).delete()
        for user in self.users.values():
            organizations.ensure_personal_organization(user)
        by_member = {"user_id": self.users["member"].public_id, "request_id": "req_member"}
        settlement.settle(make_finished(self.acme.public_id, **by_member))
        RefusedRequest.objects.create(
            organization_id=self.acme.public_id,
            user_id=self.users["member"].public_id,
            request_id="req_refused",
            code="killed",
            message="Stopped",
            source="api",
            occurred_at=timezone.now(),
        )
        killswitch.trip("model:old", reason="Retired", by=ADA)
        self._fill_admin()
        self.keys = self._make_keys()
        self.values = self._make_values()
        self.cookies = {name: _log_in(user) for name, user in self.users.items()}

    def _fill_admin(self) -> None:
        """Have a row of each table that the admin shows, so that its pages are there to be asked for."""
        scope, now = f"organization:{self.acme.public_id}", timezone.now()
        budget = Budget.objects.create(scope=scope, limit_nanousd=USD, thresholds=["80%"])
        SpendAlert.objects.create(
            scope=scope,
            budget_id=budget.public_id,
            period="monthly",
            period_start=now,
            threshold="80% of $1.00",
            spent_nanousd=USD,
            limit_nanousd=USD,
        )
        Rerating.objects.create(
            model=CHAT,
            since=now,
            until=now,
            prompt_nanousd_per_token=1,
            cached_prompt_nanousd_per_token=1,
            completion_nanousd_per_token=1,
            reason="A test",
        )
        self.endpoint, _ = webhooks.make_endpoint("https://127.0.0.1/hook", self.acme)
        ModerationFlag.objects.create(
            organization_id=self.acme.public_id, request_id="req_member", source="api", model=CHAT, action="flag"
        )
        Upstream.objects.create(name="elsewhere", base_url="https://example.com/v1")

    def _make_keys(self) -> dict[str, str]:
        owner, manages = self.users["owner"], KeyTerms(can_manage=True)
        revoked, raw = create_key(self.acme, owner, "", manages)
        revoke_key(revoked)
        return {
            "key": create_key(self.acme, owner)[1],
            "manager": create_key(self.acme, owner, "", manages)[1],
            "foreign": self.cast.raw,
            "revoked": raw,
            "wrong": "sk-aiscale-wrong",
        }

    def _make_values(self) -> dict[str, str]:
        member = self.users["member"]
        invitation = invitations.invite(self.users["owner"], self.acme, "invited@example.com", "member")
        return {
            "organization_id": self.acme.public_id,
            "member_id": Membership.objects.get(user=member, organization=self.acme).public_id,
            "key_id": create_key(self.acme, member)[0].public_id,
            "invitation_id": invitation.public_id,
            "token": invitations.make_token(invitation),
            "conversation_id": self.conversation_id,
            "file_id": "file_1",
            "response_id": "resp_1",
            "batch_id": "batch_1",
            "message_batch_id": "msgbatch_1",
            "request_id": "req_member",
            "endpoint_id": self.endpoint.public_id,
            "delivery_id": "msg_1",
            "model": CHAT,
        }

    def keep(self) -> None:
        """Have ``/v1`` keep one of each thing for Acme, as if nobody had deleted it."""
        until = timezone.now() + timedelta(days=1)
        keeping.keep(
            self.acme.public_id,
            io.BytesIO(b"{}"),
            filename="a.jsonl",
            purpose="batch",
            size_bytes=2,
            file_id=self.values["file_id"],
        )
        StoredResponse.objects.update_or_create(
            public_id=self.values["response_id"],
            defaults={
                "organization": self.acme,
                "status": "completed",
                "job_id": "job_1",
                "input_items": [],
                "response": {},
                "expires_at": until,
            },
        )
        Batch.objects.update_or_create(
            public_id=self.values["batch_id"],
            defaults={
                "organization": self.acme,
                "input_file_id": "file_1",
                "status": "validating",
                "expires_at": until,
            },
        )
        Batch.objects.update_or_create(
            public_id=self.values["message_batch_id"],
            defaults={
                "organization": self.acme,
                "endpoint": "/v1/messages",
                "status": "in_progress",
                "expires_at": until,
            },
        )

    def _talk(self, name: str) -> tuple[str, str]:
        turn = turns._begin(self.users[name].public_id, None, CHAT, "Mine alone", "c1", self.acme.public_id)
        Message.objects.filter(public_id=turn.answer_id).update(status="complete", content="Yours")
        return turn.conversation_id, turn.answer_id


def _log_in(user: User) -> str:
    client = Client()
    client.force_login(user)
    return client.cookies[settings.SESSION_COOKIE_NAME].value
