"""Describe organizations, members, invitations and keys to programs, and read what programs send. Times are Unix seconds."""

from datetime import UTC, datetime
from typing import Any

from rest_framework import serializers

from apps.accounts import key_limits
from apps.accounts.keys import MAX_MODELS, MAX_NUMBER, NAME_CHARS, PREFIX, KeyTerms
from apps.accounts.models import ApiKey, Invitation, Membership
from apps.accounts.organizations import LEAST_ERROR_PERCENT, MOST_ERROR_PERCENT
from apps.accounts.roles import Role


class Body(serializers.Serializer[Any]):
    """Read a JSON object, and refuse by name what is not known."""

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data:
                if name not in self.fields:
                    raise serializers.ValidationError({name: f"Unknown parameter: {name!r}."})
        return super().to_internal_value(data)


class UnixTime(serializers.IntegerField):
    """Read a moment in Unix seconds."""

    LAST = 4_000_000_000

    def to_internal_value(self, data: Any) -> Any:
        seconds = super().to_internal_value(data)
        if not 0 <= seconds <= self.LAST:
            raise serializers.ValidationError(f"A time is 0 to {self.LAST}, in Unix seconds.")
        return datetime.fromtimestamp(seconds, UTC)


class OrganizationBody(Body):
    name = serializers.CharField(max_length=1000, help_text="1 to 120 characters.")


class OrganizationChangeBody(Body):
    name = serializers.CharField(max_length=1000, required=False, help_text="1 to 120 characters.")
    semantic_cache = serializers.BooleanField(
        required=False, help_text="Whether chats that ask the same in other words share answers."
    )
    semantic_max_error_percent = serializers.FloatField(
        required=False,
        min_value=float(LEAST_ERROR_PERCENT),
        max_value=float(MOST_ERROR_PERCENT),
        help_text="How many of all questions may get a wrong answer by that, 0.1 to 10, in steps of 0.1.",
    )


class RoleBody(Body):
    role = serializers.ChoiceField(choices=Role.choices)


class InvitationBody(Body):
    email = serializers.CharField(max_length=1000)
    role = serializers.ChoiceField(choices=Role.choices, default=Role.MEMBER.value)


class TransferBody(Body):
    member_id = serializers.CharField(max_length=100)


class KeyBody(Body):
    name = serializers.CharField(max_length=NAME_CHARS, default="", allow_blank=True)
    expires_at = UnixTime(required=False, allow_null=True, help_text="Unix seconds.")
    allowed_models = serializers.ListField(
        child=serializers.CharField(max_length=128), default=list, max_length=MAX_MODELS, help_text="Empty: all."
    )
    requests_per_window = serializers.IntegerField(required=False, allow_null=True, min_value=1, max_value=MAX_NUMBER)
    window_s = serializers.IntegerField(required=False, allow_null=True, min_value=1, max_value=MAX_NUMBER)
    tokens_per_minute = serializers.IntegerField(required=False, allow_null=True, min_value=1, max_value=MAX_NUMBER)
    max_in_flight = serializers.IntegerField(required=False, allow_null=True, min_value=1, max_value=MAX_NUMBER)
    monthly_limit_nanousd = serializers.IntegerField(
        required=False,
        allow_null=True,
        min_value=0,
        max_value=key_limits.CEILING_NANOUSD,
        help_text="What it may spend in a month of its organization: billionths of a US dollar. Left out: what the organization may.",
    )
    can_manage = serializers.BooleanField(default=False, help_text="It may manage the organization over this API.")

    def make_terms(self) -> KeyTerms:
        """Return what was asked for. Only once it is valid."""
        values = {name: value for name, value in self.validated_data.items() if name != "name"}
        return KeyTerms(**values | {"allowed_models": tuple(values["allowed_models"])})


class KeyChangeBody(Body):
    """Hold what of a key is to be another. Null: no such limit."""

    name = serializers.CharField(max_length=NAME_CHARS, required=False, allow_blank=True)
    expires_at = UnixTime(required=False, allow_null=True, help_text="Unix seconds; null: never.")
    allowed_models = serializers.ListField(
        child=serializers.CharField(max_length=128), required=False, max_length=MAX_MODELS, help_text="Empty: all."
    )
    requests_per_window = serializers.IntegerField(required=False, allow_null=True, min_value=1, max_value=MAX_NUMBER)
    window_s = serializers.IntegerField(required=False, allow_null=True, min_value=1, max_value=MAX_NUMBER)
    tokens_per_minute = serializers.IntegerField(required=False, allow_null=True, min_value=1, max_value=MAX_NUMBER)
    max_in_flight = serializers.IntegerField(required=False, allow_null=True, min_value=1, max_value=MAX_NUMBER)
    monthly_limit_nanousd = serializers.IntegerField(
        required=False,
        allow_null=True,
        min_value=0,
        max_value=key_limits.CEILING_NANOUSD,
        help_text="What it may spend in a month of its organization: billionths of a US dollar; null: what the organization may.",
    )

    def read_changes(self) -> dict[str, Any]:
        """Return what was named, as `keys.change_key` takes it. Only once it is valid."""
        changes = dict(self.validated_data)
        if "allowed_models" in changes:
            changes["allowed_models"] = tuple(changes["allowed_models"])
        return changes


def describe_organization(place: Membership) -> dict[str, Any]:
    organization = place.organization
    return {
        "id": organization.public_id,
        "object": "organization",
        "name": organization.display_name,
        "personal": organization.is_personal,
        "plan": organization.plan.slug,
        "role": place.role,
        "suspended": not organization.is_active,
        "semantic_cache": organization.semantic_cache,
        "semantic_max_error_percent": float(organization.semantic_max_error_percent),
        "created_at": int(organization.created_at.timestamp()),
    }


def describe_member(member: Membership) -> dict[str, Any]:
    return {
        "id": member.public_id,
        "object": "organization.member",
        "user_id": member.user.public_id,
        "email": member.user.email,
        "role": member.role,
        "created_at": int(member.created_at.timestamp()),
    }


def describe_invitation(invitation: Invitation) -> dict[str, Any]:
    return {
        "id": invitation.public_id,
        "object": "organization.invitation",
        "email": invitation.email,
        "role": invitation.role,
        "status": "expired" if invitation.is_expired else invitation.state,
        "invited_by": invitation.invited_by.email if invitation.invited_by else None,
        "created_at": int(invitation.created_at.timestamp()),
        "expires_at": int(invitation.expires_at.timestamp()),
    }


def describe_key(key: ApiKey, raw: str | None = None) -> dict[str, Any]:
    """Describe a key; with ``raw`` only in the answer to its making."""
    value = {"value": raw} if raw else {}
    return {
        "id": key.public_id,
        "object": "organization.api_key",
        "name": key.name,
        "redacted_value": f"{PREFIX}…{key.hint}",
        **value,
        "owner": {"user_id": key.created_by.public_id, "email": key.created_by.email},
        "status": key.state,
        "created_at": int(key.created_at.timestamp()),
        "expires_at": int(key.expires_at.timestamp()) if key.expires_at else None,
        "last_used_at": int(key.last_used_at.timestamp()) if key.last_used_at else None,
        "allowed_models": key.allowed_models,
        "requests_per_window": key.requests_per_window,
        "window_s": key.window_s,
        "tokens_per_minute": key.tokens_per_minute,
        "max_in_flight": key.max_in_flight,
        "monthly_limit_nanousd": key.month_limit_nanousd,
        "month_spent_nanousd": key.month_spent_nanousd if key.month_limit_nanousd is not None else None,
        "can_manage": key.can_manage,
    }


def describe_deleted(kind: str, public_id: str) -> dict[str, Any]:
    return {"id": public_id, "object": f"{kind}.deleted", "deleted": True}
