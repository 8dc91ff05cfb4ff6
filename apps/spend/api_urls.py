"""Map ``/api/v1/usage`` and ``/api/v1/requests``."""

from django.urls import re_path

from apps.spend import api

urlpatterns = [
    re_path(r"^usage/?$", api.StatementView.as_view(), name="api_usage"),
    re_path(r"^usage\.csv$", api.StatementFile.as_view(), name="api_usage_csv"),
    re_path(r"^usage/requests\.csv$", api.RequestsFile.as_view(), name="api_requests_csv"),
    re_path(r"^requests/(?P<request_id>[^/]{1,200})/?$", api.RequestView.as_view(), name="api_request"),
]
