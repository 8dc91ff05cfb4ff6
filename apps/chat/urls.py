"""Map the pages of the chat."""

from django.urls import path

from apps.chat import views

app_name = "chat"
urlpatterns = [
    path("", views.show_home, name="home"),
    path("instructions/", views.edit_instructions, name="instructions"),
    path("c/", views.list_conversations, name="list"),
    path("c/<str:conversation_id>/", views.show_conversation, name="conversation"),
    path("c/<str:conversation_id>/export/", views.export, name="export"),
    path("c/<str:conversation_id>/rename/", views.rename, name="rename"),
    path("c/<str:conversation_id>/delete/", views.delete, name="delete"),
]
