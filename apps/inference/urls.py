"""Map ``/account/organizations/<id>/cache/``."""

from django.urls import path

from apps.inference.cache import views

app_name = "inference"

urlpatterns = [
    path("organizations/<str:organization_id>/cache/", views.show_cache, name="cache"),
    path("organizations/<str:organization_id>/cache/purge/", views.purge, name="purge_cache"),
]
