"""Map ``/account/usage/`` and ``/account/requests/``, the pages of what was used, and an organization's webhooks."""

from django.urls import include, path

from apps.spend import request_views, usage_views, webhook_views

app_name = "spend"

_webhooks = [
    path("", webhook_views.show_webhooks, name="webhooks"),
    path("<str:endpoint_id>/test/", webhook_views.send_test, name="test_webhook"),
    path("<str:endpoint_id>/secret/", webhook_views.rotate, name="rotate_webhook"),
    path("<str:endpoint_id>/active/", webhook_views.set_active, name="pause_webhook"),
    path("messages/<str:delivery_id>/resend/", webhook_views.resend, name="resend_webhook"),
    path("<str:endpoint_id>/delete/", webhook_views.delete, name="delete_webhook"),
]

urlpatterns = [
    path("organizations/<str:organization_id>/webhooks/", include(_webhooks)),
    path("usage/", usage_views.show_usage, name="usage"),
    path("usage/statement.csv", usage_views.download_statement, name="statement_csv"),
    path("usage/requests.csv", usage_views.download_requests, name="requests_csv"),
    path("requests/", request_views.list_requests, name="requests"),
    path("requests/<str:request_id>/", request_views.show_request, name="request"),
]
