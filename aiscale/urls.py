"""Map paths to apps. ``/v1/`` is not here: ``aiscale.asgi`` answers it before Django."""

from django.contrib import admin
from django.urls import include, path

from aiscale import health

urlpatterns = [
    path("healthz", health.healthz),
    path("readyz", health.readyz),
    path("admin/", admin.site.urls),
    path("accounts/", include("allauth.urls")),
    path("account/", include("apps.accounts.urls")),
    path("", include("apps.chat.urls")),
]
