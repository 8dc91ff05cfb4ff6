"""Find batches that somebody must go on with."""

from datetime import timedelta

from django.db.models import Q
from django.db.models.functions import Now
from django.utils import timezone

from apps.gateway.models import Batch

AT_ONCE = 20
KEPT = timedelta(days=90)


def list_due() -> list[str]:
    """List the open batches that nobody works on and whose time has come, oldest first. I/O: one SQL statement."""
    free = Q(lease_until__isnull=True) | Q(lease_until__lt=Now())
    due = Q(due_at__isnull=True) | Q(due_at__lte=Now()) | Q(status=Batch.Status.CANCELLING)
    rows = Batch.objects.filter(free & due, status__in=Batch.OPEN).order_by("updated_at", "id")
    return list(rows.values_list("public_id", flat=True)[:AT_ONCE])


def forget_old() -> int:
    """Delete batches that ended long ago; their files stay until they are deleted. Returns how many. I/O: SQL."""
    old = Batch.objects.exclude(status__in=Batch.OPEN).filter(updated_at__lt=timezone.now() - KEPT)
    deleted, _ = Batch.objects.filter(pk__in=list(old.values_list("pk", flat=True)[:200])).delete()
    return deleted
