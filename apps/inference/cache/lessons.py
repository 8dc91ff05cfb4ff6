"""Keep the semantic cache's rows: decide by them, teach them, tidy them. All of it is SQL; `semantic` is what requests call.

The decision and what it spends are one transaction under the organization's account: requests that come at once cannot spend the same
room twice, and a process that dies has spent too much rather than too little.
"""

from datetime import timedelta
from typing import Any

import msgspec
from django.db import transaction
from django.utils import timezone

from apps.accounts.models import Organization
from apps.inference.cache import thresholds
from apps.inference.cache.thresholds import Account, Observation
from apps.inference.models import SemanticAccount, SemanticEntry

TTL_S = 86_400
MAX_ENTRIES = 10_000
"""Of an organization: each look-up goes through those of its place."""
TEACHERS = 500
"""Entries, the newest, whose observations make an organization's prior."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Say where an answer may be found. ``context`` stands for the whole request but its last message, and for the cache's generation."""

    organization_id: str
    model: str
    version: str
    context: bytes


class Nearest(msgspec.Struct, frozen=True, kw_only=True):
    """Hold the entry that is most alike, and whether its answer is given."""

    entry_id: int
    value: bytes
    similarity: float
    is_given: bool


def decide(place: Place, vector: Any, max_error_rate: float, draw: float) -> Nearest | None:
    """Look for the nearest entry, and spend the risk of its reuse where there is room for it. None when nothing is near.

    I/O: five SQL statements in a transaction. Raises: django.db.Error.
    """
    with transaction.atomic():
        entry = SemanticEntry.objects.find_nearest(msgspec.structs.asdict(place), vector)
        row, _ = SemanticAccount.objects.select_for_update().get_or_create(organization_id=place.organization_id)
        account = Account(row.lookups, row.spent).look()
        nearest = None
        if entry is not None and entry.similarity >= thresholds.NEAR:  # type: ignore[attr-defined]
            similarity = min(float(entry.similarity), 1.0)  # type: ignore[attr-defined]
            prior = thresholds.unpack_prior(bytes(row.prior))
            risk = thresholds.find_risk(similarity, read_observations(entry), prior)
            is_given = thresholds.may_reuse(risk, account, max_error_rate, draw)
            account = account.spend(risk) if is_given else account
            nearest = Nearest(entry_id=entry.pk, value=bytes(entry.value), similarity=similarity, is_given=is_given)
        row.lookups, row.spent = account.lookups, account.spent
        row.save(update_fields=["lookups", "spent"])
    return nearest


def observe(entry_id: int, similarity: float, is_right: bool) -> None:
    """Write down that an entry's answer proved right or wrong. I/O: two SQL statements. Raises: django.db.Error."""
    with transaction.atomic():
        entry = SemanticEntry.objects.select_for_update(no_key=True).filter(pk=entry_id).first()
        if entry is not None:
            observations = [*entry.observations, [round(similarity, 4), is_right]]
            entry.observations = observations[-thresholds.MAX_OBSERVATIONS :]
            entry.save(update_fields=["observations"])


def add(place: Place, vector: Any, value: bytes) -> None:
    """Keep an answer for prompts that will be alike. I/O: one SQL statement. Raises: django.db.Error."""
    expires_at = timezone.now() + timedelta(seconds=TTL_S)
    SemanticEntry.objects.create(**msgspec.structs.asdict(place), vector=vector, value=value, expires_at=expires_at)


def tidy() -> None:
    """Delete what has expired, what is too much, and what nobody wants any more; then learn each organization's prior anew. I/O: SQL."""
    while SemanticEntry.objects.delete_expired() == 5_000:
        pass
    wanted = Organization.objects.filter(semantic_cache=True, deleted_at=None).values("public_id")
    SemanticEntry.objects.exclude(organization_id__in=wanted).delete()
    SemanticAccount.objects.exclude(organization_id__in=wanted).delete()
    SemanticEntry.objects.trim(MAX_ENTRIES)
    for account in SemanticAccount.objects.only("pk"):
        taught = SemanticEntry.objects.filter(organization_id=account.pk).exclude(observations=[])
        lists = [read_observations(entry) for entry in taught.only("observations").order_by("-pk")[:TEACHERS]]
        # the other columns belong to the look-ups that come meanwhile
        prior = thresholds.pack_prior(thresholds.learn_prior(lists)) if lists else b""
        SemanticAccount.objects.filter(pk=account.pk).update(prior=prior)


def read_observations(entry: SemanticEntry) -> list[Observation]:
    return [(float(similarity), bool(is_right)) for similarity, is_right in entry.observations]
