"""Show who talks how much. What was said is not shown to admins."""

from typing import Any

from django.contrib import admin
from django.db.models import Count, QuerySet
from django.http import HttpRequest
from unfold.admin import ModelAdmin

from apps.chat.models import Conversation


@admin.register(Conversation)
class ConversationAdmin(ModelAdmin):  # type: ignore[misc]
    list_display = [
        "public_id",
        "user",
        "organization",
        "model",
        "message_count",
        "created_at",
        "used_at",
        "deleted_at",
    ]
    list_filter = ["model", ("deleted_at", admin.EmptyFieldListFilter)]
    search_fields = ["=public_id", "user__email", "=organization__public_id"]
    search_help_text = "The exact id of a conversation or organization, or a user's e-mail address."
    list_select_related = ["user", "organization"]
    date_hierarchy = "used_at"
    show_full_result_count = False
    fields = readonly_fields = [
        "public_id",
        "user",
        "organization",
        "model",
        "message_count",
        "created_at",
        "used_at",
        "deleted_at",
    ]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).annotate(message_count=Count("messages"))  # type: ignore[no-any-return]

    @admin.display(description="messages", ordering="message_count")
    def message_count(self, conversation: Any) -> int:
        return int(conversation.message_count)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False
