"""Map paths to apps. ``/v1/`` is not here: ``aiscale.asgi`` answers it before Django."""

from allauth.account.decorators import secure_admin_login
from django.contrib import admin
from django.templatetags.static import static
from django.urls import include, path, re_path
from django.views.generic import RedirectView

from aiscale import api_errors, health

# one login for everybody, with its limits on guessing
admin.site.login = secure_admin_login(admin.site.login)  # type: ignore[method-assign]

urlpatterns = [
    path("favicon.ico", RedirectView.as_view(url=static("img/mark.svg"))),
    path("healthz", health.healthz),
    path("readyz", health.readyz),
    path("metrics", health.show_metrics, name="metrics"),
    path("admin/", admin.site.urls),
    path("accounts/", include("allauth.urls")),
    path("account/", include("apps.accounts.urls")),
    path("account/", include("apps.spend.urls")),
    path("account/", include("apps.inference.urls")),
    path("api/v1/", include("apps.accounts.api_urls")),
    path("api/v1/", include("apps.spend.api_urls")),
    path("api/v1/", include("apps.inference.api_urls")),
    path("api/", include("apps.gateway.urls")),
    re_path(r"^api/", api_errors.NoSuchPath.as_view()),
    path("", include("apps.chat.urls")),
]
