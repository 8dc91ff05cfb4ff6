"""Map ``/account/usage/``: the pages of what was used."""

from django.urls import path

from apps.spend import usage_views

app_name = "spend"
urlpatterns = [
    path("usage/", usage_views.show_usage, name="usage"),
    path("usage/statement.csv", usage_views.download_statement, name="statement_csv"),
    path("usage/requests.csv", usage_views.download_requests, name="requests_csv"),
]
