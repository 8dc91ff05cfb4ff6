"""Describe the answers of ``/api/v1/organizations`` for the OpenAPI document. A test holds them against what is answered."""

from collections.abc import Callable
from typing import Any

from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers

from apps.accounts.roles import Role

MOST = 100
PAGING = [
    OpenApiParameter("limit", int, description=f"How many, 1 to {MOST}; 20 when left out."),
    OpenApiParameter("after", str, description="The id after which the page begins."),
    OpenApiParameter("order", str, enum=["asc", "desc"], description="By time of making; desc when left out."),
]

Shape = serializers.Serializer


class OrganizationShape(Shape[Any]):
    id = serializers.CharField()
    object = serializers.CharField()
    name = serializers.CharField()
    personal = serializers.BooleanField()
    plan = serializers.CharField()
    role = serializers.ChoiceField(choices=Role.choices, help_text="Your own role in it.")
    suspended = serializers.BooleanField()
    semantic_cache = serializers.BooleanField(help_text="Whether alike questions share answers.")
    semantic_max_error_percent = serializers.FloatField(
        help_text="How many of all questions may be answered wrongly by that."
    )
    created_at = serializers.IntegerField(help_text="Unix seconds, as all times.")


class MemberShape(Shape[Any]):
    id = serializers.CharField()
    object = serializers.CharField()
    user_id = serializers.CharField()
    email = serializers.EmailField()
    role = serializers.ChoiceField(choices=Role.choices)
    created_at = serializers.IntegerField()


class InvitationShape(Shape[Any]):
    id = serializers.CharField()
    object = serializers.CharField()
    email = serializers.EmailField()
    role = serializers.ChoiceField(choices=Role.choices)
    status = serializers.ChoiceField(choices=["pending", "expired", "accepted", "declined", "revoked"])
    invited_by = serializers.EmailField(allow_null=True)
    created_at = serializers.IntegerField()
    expires_at = serializers.IntegerField()


class OwnerShape(Shape[Any]):
    user_id = serializers.CharField()
    email = serializers.EmailField()


class KeyShape(Shape[Any]):
    id = serializers.CharField()
    object = serializers.CharField()
    name = serializers.CharField()
    redacted_value = serializers.CharField()
    owner = OwnerShape()
    status = serializers.ChoiceField(choices=["active", "revoked", "expired"])
    created_at = serializers.IntegerField()
    expires_at = serializers.IntegerField(allow_null=True)
    last_used_at = serializers.IntegerField(allow_null=True)
    allowed_models = serializers.ListField(child=serializers.CharField())
    requests_per_window = serializers.IntegerField(allow_null=True)
    window_s = serializers.IntegerField(allow_null=True)
    tokens_per_minute = serializers.IntegerField(allow_null=True)
    max_in_flight = serializers.IntegerField(allow_null=True)
    monthly_limit_nanousd = serializers.IntegerField(allow_null=True, help_text="Billionths of a US dollar.")
    month_spent_nanousd = serializers.IntegerField(allow_null=True, help_text="Of this month; null without a limit.")
    can_manage = serializers.BooleanField()


class NewKeyShape(KeyShape):
    value = serializers.CharField(help_text="The key itself. It is shown this once.")


class DeletedShape(Shape[Any]):
    id = serializers.CharField()
    object = serializers.CharField()
    deleted = serializers.BooleanField()


class ErrorPart(Shape[Any]):
    message = serializers.CharField()
    type = serializers.CharField()
    param = serializers.CharField(allow_null=True)
    code = serializers.CharField()


class ErrorShape(Shape[Any]):
    error = ErrorPart()


def document(
    summary: str, answer: type[Shape[Any]], *, body: Any = None, status: int = 200, many: bool = False, errors: str = ""
) -> Callable[[Any], Any]:
    """Describe an operation: what it takes, what it answers, and with which statuses it refuses (401, 403, 404 and 429 always)."""
    shape: Any = _make_list_shape(answer) if many else answer
    refusals = dict.fromkeys([401, 403, 404, 429, *(int(each) for each in errors.split())], ErrorShape)
    parameters = PAGING if many and answer is not OrganizationShape else None
    made: Callable[[Any], Any] = extend_schema(
        summary=summary,
        tags=["Organizations"],
        request=body,
        responses={status: shape, **refusals},
        parameters=parameters,
    )
    return made


def _make_list_shape(answer: type[Shape[Any]]) -> Any:
    fields = {
        "object": serializers.CharField(),
        "data": answer(many=True),
        "has_more": serializers.BooleanField(),
    }
    return type(answer.__name__.replace("Shape", "ListShape"), (serializers.Serializer,), fields)
