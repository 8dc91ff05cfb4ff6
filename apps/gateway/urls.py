from django.urls import path

from apps.gateway.reference import views

app_name = "gateway"
urlpatterns = [
    path("openapi.json", views.show_document, name="openapi"),
    path("docs", views.show_docs, name="docs"),
]
