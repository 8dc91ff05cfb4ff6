"""Make and revoke API keys."""

import secrets

from django.utils import timezone

from apps.accounts.callers import hash_key
from apps.accounts.models import ApiKey, Organization, User

PREFIX = "sk-aiscale-"


def create_key(organization: Organization, user: User, name: str = "") -> tuple[ApiKey, str]:
    """Make a key and return it with its raw text, which is nowhere else: show it once. I/O: SQL, one Redis trip."""
    raw = PREFIX + secrets.token_urlsafe(32)
    key = ApiKey.objects.create(
        organization=organization, created_by=user, name=name, digest=hash_key(raw), hint=raw[-4:]
    )
    return key, raw


def revoke_key(key: ApiKey) -> None:
    """Refuse the key from now on, everywhere. I/O: SQL, one Redis trip. Idempotent."""
    if key.revoked_at is None:
        key.revoked_at = timezone.now()
        key.save(update_fields=["revoked_at", "updated_at"])
