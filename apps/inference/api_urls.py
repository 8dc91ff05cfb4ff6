"""Map ``/api/v1/organizations/<id>/cache``."""

from django.urls import re_path

from apps.inference.cache import api

urlpatterns = [
    re_path(r"^organizations/(?P<organization_id>[^/]+)/cache/?$", api.Cache.as_view(), name="api_cache"),
]
