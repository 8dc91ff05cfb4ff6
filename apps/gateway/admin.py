"""Show the files, batches and responses that callers keep here: whose, how large and how far, never what is in them."""

from typing import Any

from django.contrib import admin, messages
from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest
from django.template.defaultfilters import filesizeformat
from unfold.admin import ModelAdmin

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError
from apps.accounts import audit
from apps.gateway import loops
from apps.gateway.batches import answers as batches
from apps.gateway.files import keeping
from apps.gateway.models import Batch, StoredFile, StoredResponse
from apps.inference import queue


class Kept(ModelAdmin):  # type: ignore[misc]
    """Be read, and deleted through the code that its callers use too. Each deletion is in the audit log."""

    search_fields = ["=public_id", "=organization__public_id", "organization__name"]
    search_help_text = "The exact id, or an organization's exact id or name."
    list_select_related = ["organization"]
    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def remove(self, row: Any) -> None:
        """Delete one row with all that belongs to it."""
        raise NotImplementedError

    def delete_model(self, request: HttpRequest, obj: Any) -> None:
        with transaction.atomic():
            note(request, obj, "delete")
        self.remove(obj)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        for row in queryset.select_related("organization"):
            self.delete_model(request, row)


@admin.register(StoredFile)
class StoredFileAdmin(Kept):
    list_display = ["public_id", "organization", "purpose", "size", "state", "created_at", "expires_at"]
    list_filter = ["purpose", "state", "created_at"]
    fields = readonly_fields = [
        "public_id",
        "organization",
        "filename",
        "purpose",
        "size",
        "state",
        "created_at",
        "expires_at",
    ]

    @admin.display(description="size", ordering="size_bytes")
    def size(self, file: StoredFile) -> str:
        return filesizeformat(file.size_bytes)

    def remove(self, row: StoredFile) -> None:
        keeping.delete(row)


@admin.register(Batch)
class BatchAdmin(Kept):
    list_display = ["public_id", "organization", "endpoint", "status", "progress", "created_at"]
    list_filter = ["status", "endpoint", "created_at"]
    fields = readonly_fields = [
        "public_id",
        "organization",
        "endpoint",
        "status",
        "progress",
        "problems",
        "input_file_id",
        "output_file_id",
        "error_file_id",
        "created_at",
        "due_at",
        "expires_at",
    ]
    actions = ["cancel_selected"]

    @admin.display(description="requests")
    def progress(self, batch: Batch) -> str:
        failed = f", {batch.failed_count} failed" if batch.failed_count else ""
        return f"{batch.completed_count} of {batch.total_count} done{failed}"

    @admin.action(description="Cancel the selected batches", permissions=["cancel"])
    def cancel_selected(self, request: HttpRequest, queryset: QuerySet[Batch]) -> None:
        """Start no more of their requests; what was answered is kept."""
        count = 0
        for batch in queryset.select_related("organization"):
            try:
                with transaction.atomic():
                    batches.cancel(
                        batch.organization.public_id, batch.public_id, of_messages=batch.endpoint == batches.MESSAGES
                    )
                    note(request, batch, "cancel")
            except AiscaleError as refusal:
                messages.warning(request, refusal.message)
            else:
                count += 1
        if count:
            messages.success(request, f"{count} {'batch starts' if count == 1 else 'batches start'} no more requests.")

    def has_delete_permission(self, request: HttpRequest, obj: Batch | None = None) -> bool:
        """A batch stays: its requests were paid for."""
        return False

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("gateway.delete_batch"))


@admin.register(StoredResponse)
class StoredResponseAdmin(Kept):
    list_display = ["public_id", "organization", "model_name", "status", "is_background", "created_at"]
    list_filter = ["status", "is_background", "created_at"]
    fields = readonly_fields = [
        "public_id",
        "organization",
        "model_name",
        "status",
        "is_background",
        "job_id",
        "previous_id",
        "created_at",
        "expires_at",
    ]
    actions = ["cancel_selected"]

    @admin.display(description="model")
    def model_name(self, response: StoredResponse) -> str:
        return str(response.response.get("model", ""))

    @admin.action(description="Cancel the selected responses", permissions=["cancel"])
    def cancel_selected(self, request: HttpRequest, queryset: QuerySet[StoredResponse]) -> None:
        """Stop those that are still made. What was made until then is kept, and charged."""
        count = 0
        for row in queryset.filter(status=StoredResponse.Status.IN_PROGRESS).select_related("organization"):
            if not self._stop(request, row):
                return
            with transaction.atomic():
                note(request, row, "cancel")
            count += 1
        messages.success(request, f"{count} {'response is' if count == 1 else 'responses are'} stopped.")

    def delete_model(self, request: HttpRequest, obj: StoredResponse) -> None:
        if obj.status != StoredResponse.Status.IN_PROGRESS or self._stop(request, obj):
            super().delete_model(request, obj)

    def remove(self, row: StoredResponse) -> None:
        row.delete()

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("gateway.delete_storedresponse"))

    def _stop(self, request: HttpRequest, row: StoredResponse) -> bool:
        try:
            loops.run(queue.cancel(row.job_id, "stopped by an administrator"))
        except redis_clients.UNAVAILABLE:
            messages.error(
                request, "Redis does not answer: nothing can be stopped right now. Try again in a few seconds."
            )
            return False
        return True


def note(request: HttpRequest, row: Any, verb: str) -> None:
    """Write down who did what to whose. I/O: one SQL statement."""
    kind = {StoredFile: "file", Batch: "batch", StoredResponse: "response"}[type(row)]
    audit.record(
        f"{kind}.{verb}",
        target=f"{kind}:{row.public_id}",
        by=audit.by_request(request),
        organization_id=row.organization.public_id,
    )
