"""Map ``/account/``: what allauth does not bring."""

from django.urls import path

from apps.accounts import views

app_name = "accounts"
urlpatterns = [
    path("keys/", views.show_keys, name="keys"),
    path("keys/<str:key_id>/revoke/", views.revoke, name="revoke_key"),
]
