"""Answer ``/api/v1/organizations/<id>/webhooks``: what the webhooks page does, for programs, by the same rules."""

from typing import Any

from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from aiscale.errors import AiscaleError, Code
from aiscale.listing import make_list, read_page
from apps.accounts.api_access import Access, read_access
from apps.accounts.api_shapes import MOST, DeletedShape, document
from apps.accounts.rates import ADD_WEBHOOK, TEST_WEBHOOK, check_rate
from apps.accounts.roles import Right
from apps.accounts.serializers import Body, describe_deleted
from apps.spend import endpoints, webhooks
from apps.spend.alert_models import AlertDelivery, WebhookEndpoint

PAGE = 20


class WebhookBody(Body):
    url = serializers.CharField(max_length=2000, help_text="A public https address.")


class WebhookChangeBody(Body):
    active = serializers.BooleanField(help_text="false: it pauses, and is told nothing.")


class WebhookShape(serializers.Serializer[Any]):
    id = serializers.CharField()
    object = serializers.CharField()
    url = serializers.CharField()
    active = serializers.BooleanField()
    blocked = serializers.BooleanField(help_text="An administrator of the service stopped it; only they let it go on.")
    last_result = serializers.CharField(allow_null=True, help_text="delivered, or why the last message did not arrive.")
    last_tried_at = serializers.IntegerField(allow_null=True, help_text="Unix seconds, as all times.")
    old_secret_until = serializers.IntegerField(allow_null=True, help_text="Until then the old secret signs too.")
    created_at = serializers.IntegerField()


class NewWebhookShape(WebhookShape):
    secret = serializers.CharField(help_text="It signs what is sent. It is shown this once.")


class TestShape(serializers.Serializer[Any]):
    object = serializers.CharField()
    delivered = serializers.BooleanField()
    error = serializers.CharField(allow_null=True)


class DeliveryShape(serializers.Serializer[Any]):
    id = serializers.CharField(help_text="What the receiver reads as webhook-id: the same over all tries.")
    object = serializers.CharField()
    webhook_id = serializers.CharField()
    type = serializers.CharField()
    threshold = serializers.CharField()
    status = serializers.ChoiceField(choices=["pending", "delivered", "failed"])
    attempts = serializers.IntegerField()
    error = serializers.CharField(allow_null=True)
    created_at = serializers.IntegerField()
    delivered_at = serializers.IntegerField(allow_null=True)
    next_attempt_at = serializers.IntegerField(allow_null=True)


class Webhooks(APIView):
    @document("List webhooks", WebhookShape, many=True)
    def get(self, request: Request, organization_id: str) -> Response:
        access = _read_access(request, organization_id)
        return Response(make_list(access.organization.webhook_endpoints.all(), _page(request), _describe))

    @document("Add a webhook", NewWebhookShape, body=WebhookBody, status=201, errors="400 409")
    def post(self, request: Request, organization_id: str) -> Response:
        """It is told of budget alerts, signed as Standard Webhooks are. The answer holds its ``secret``, which is nowhere else."""
        access = _read_access(request, organization_id)
        body = WebhookBody(data=request.data)
        body.is_valid(raise_exception=True)
        check_rate(request._request, ADD_WEBHOOK)
        made, secret = endpoints.add(access.user, access.organization, body.validated_data["url"], actor=access.actor)
        return Response(_describe(made) | {"secret": secret}, 201)


class Webhook(APIView):
    @document("Show a webhook", WebhookShape)
    def get(self, request: Request, organization_id: str, endpoint_id: str) -> Response:
        access = _read_access(request, organization_id)
        return Response(_describe(endpoints.find(access.organization, endpoint_id)))

    @document("Pause or resume a webhook", WebhookShape, body=WebhookChangeBody, errors="400")
    def patch(self, request: Request, organization_id: str, endpoint_id: str) -> Response:
        """While it pauses, what is owed to it waits, and new alerts are not told."""
        access = _read_access(request, organization_id)
        body = WebhookChangeBody(data=request.data)
        body.is_valid(raise_exception=True)
        active = body.validated_data["active"]
        changed = endpoints.set_active(access.user, access.organization, endpoint_id, active, actor=access.actor)
        return Response(_describe(changed))

    @document("Delete a webhook", DeletedShape)
    def delete(self, request: Request, organization_id: str, endpoint_id: str) -> Response:
        """What is owed to it is not sent."""
        access = _read_access(request, organization_id)
        endpoints.delete(access.user, access.organization, endpoint_id, actor=access.actor)
        return Response(describe_deleted("organization.webhook", endpoint_id))


class Secret(APIView):
    @document("Make a webhook's secret anew", NewWebhookShape)
    def post(self, request: Request, organization_id: str, endpoint_id: str) -> Response:
        """The old one signs too for 24 hours."""
        access = _read_access(request, organization_id)
        check_rate(request._request, ADD_WEBHOOK)
        made, secret = endpoints.rotate(access.user, access.organization, endpoint_id, actor=access.actor)
        return Response(_describe(made) | {"secret": secret})


class Test(APIView):
    @document("Send a test message", TestShape)
    def post(self, request: Request, organization_id: str, endpoint_id: str) -> Response:
        """It is sent before this is answered."""
        access = _read_access(request, organization_id)
        check_rate(request._request, TEST_WEBHOOK)
        _, error = endpoints.send_test(access.organization, endpoint_id)
        return Response({"object": "organization.webhook.test", "delivered": not error, "error": error or None})


class Deliveries(APIView):
    @document("List a webhook's messages", DeliveryShape, many=True)
    def get(self, request: Request, organization_id: str, endpoint_id: str) -> Response:
        access = _read_access(request, organization_id)
        endpoint = endpoints.find(access.organization, endpoint_id)
        rows = endpoints.list_deliveries(access.organization).filter(endpoint=endpoint)
        return Response(make_list(rows, _page(request), _describe_delivery))


class Resending(APIView):
    @document("Send a message again", DeliveryShape, status=202, errors="400")
    def post(self, request: Request, organization_id: str, endpoint_id: str, delivery_id: str) -> Response:
        """Within seconds, under the same id, also when it has arrived before."""
        access = _read_access(request, organization_id)
        endpoint = endpoints.find(access.organization, endpoint_id)
        if not delivery_id.endswith(f"_{endpoint.public_id}"):
            raise AiscaleError(Code.NOT_FOUND, "This message does not exist.", param="delivery_id")
        check_rate(request._request, TEST_WEBHOOK)
        again = endpoints.resend(access.user, access.organization, delivery_id, actor=access.actor)
        return Response(_describe_delivery(again), 202)


def _read_access(request: Request, organization_id: str) -> Access:
    return read_access(request, organization_id, Right.MANAGE_WEBHOOKS)


def _page(request: Request) -> Any:
    return read_page(request.query_params.dict(), most=MOST, default=PAGE)


def _describe(endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": endpoint.public_id,
        "object": "organization.webhook",
        "url": endpoint.url,
        "active": endpoint.is_active,
        "blocked": endpoint.is_blocked,
        "last_result": endpoint.last_result or None,
        "last_tried_at": _seconds(endpoint.last_tried_at),
        "old_secret_until": _seconds(endpoint.old_secret_until),
        "created_at": _seconds(endpoint.created_at),
    }


def _describe_delivery(delivery: Any) -> dict[str, Any]:
    assert isinstance(delivery, AlertDelivery) and delivery.endpoint is not None
    status = "delivered" if delivery.delivered_at else "pending" if delivery.due_at else "failed"
    return {
        "id": webhooks.name_message(delivery.alert_id, delivery.endpoint),
        "object": "organization.webhook.delivery",
        "webhook_id": delivery.endpoint.public_id,
        "type": "budget.threshold_passed",
        "threshold": delivery.alert.threshold,
        "status": status,
        "attempts": delivery.attempts,
        "error": delivery.error or None,
        "created_at": _seconds(delivery.created_at),
        "delivered_at": _seconds(delivery.delivered_at),
        "next_attempt_at": _seconds(delivery.due_at),
    }


def _seconds(at: Any) -> int | None:
    return int(at.timestamp()) if at else None
