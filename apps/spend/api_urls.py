"""Map ``/api/v1/usage``, ``/api/v1/requests`` and an organization's webhooks."""

from django.urls import include, re_path

from apps.spend import api, webhook_api

_webhooks = [
    re_path(r"^/?$", webhook_api.Webhooks.as_view(), name="api_webhooks"),
    re_path(r"^/(?P<endpoint_id>[^/]+)/?$", webhook_api.Webhook.as_view(), name="api_webhook"),
    re_path(r"^/(?P<endpoint_id>[^/]+)/secret/?$", webhook_api.Secret.as_view(), name="api_webhook_secret"),
    re_path(r"^/(?P<endpoint_id>[^/]+)/test/?$", webhook_api.Test.as_view(), name="api_webhook_test"),
    re_path(r"^/(?P<endpoint_id>[^/]+)/deliveries/?$", webhook_api.Deliveries.as_view(), name="api_deliveries"),
    re_path(
        r"^/(?P<endpoint_id>[^/]+)/deliveries/(?P<delivery_id>[^/]+)/resend/?$",
        webhook_api.Resending.as_view(),
        name="api_resend_delivery",
    ),
]

urlpatterns = [
    re_path(r"^organizations/(?P<organization_id>[^/]+)/webhooks", include(_webhooks)),
    re_path(r"^usage/?$", api.StatementView.as_view(), name="api_usage"),
    re_path(r"^usage\.csv$", api.StatementFile.as_view(), name="api_usage_csv"),
    re_path(r"^usage/requests\.csv$", api.RequestsFile.as_view(), name="api_requests_csv"),
    re_path(r"^requests/(?P<request_id>[^/]{1,200})/?$", api.RequestView.as_view(), name="api_request"),
]
