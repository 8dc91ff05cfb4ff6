"""Take away files that are half made, half deleted, or expired."""

from datetime import timedelta

from django.db.models import Q
from django.utils import timezone

from apps.gateway.files import keeping
from apps.gateway.models import StoredFile

HALF_DONE = timedelta(hours=1)
"""Nobody uploads or deletes one file for so long."""
BATCH = 200


def tidy() -> int:
    """Delete what nobody will finish and what has expired. Returns how many. I/O: SQL, the storage. Idempotent."""
    now = timezone.now()
    half_done = Q(state__in=(StoredFile.State.UPLOADING, StoredFile.State.DELETING), updated_at__lt=now - HALF_DONE)
    rows = list(StoredFile.objects.filter(half_done | Q(expires_at__lt=now))[:BATCH])
    for row in rows:
        keeping.delete(row)
    return len(rows)
