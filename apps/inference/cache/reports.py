"""Sum up what the cache did for an organization: hits by level, what they saved, and how often alike questions were answered wrongly."""

from datetime import timedelta

import msgspec
from django.db.models import Count, Sum
from django.utils import timezone

from apps.accounts.models import Organization
from apps.inference.cache import lessons, thresholds
from apps.inference.models import SemanticAccount, SemanticEntry
from apps.spend.models import UsageRecord

DAYS = 30
LEVELS = {
    "l1": "In the web server",
    "l2": "In Redis",
    "l3": "In Postgres",
    "semantic": "An alike question",
}
ENTRIES_LOOKED_AT = 200
"""The newest, whose thresholds are summed up."""


class LevelLine(msgspec.Struct, frozen=True, kw_only=True):
    """Count the whole answers that one level gave."""

    level: str
    requests: int
    saved_nanousd: int


class SemanticReport(msgspec.Struct, frozen=True, kw_only=True):
    """Say how alike questions fared.

    ``expected_wrong_percent`` is of all look-ups, and what the bound holds for. ``compared`` times the model was asked although there was
    an alike question, and ``agreed`` times it said the same. Thresholds are similarities from which on an entry's answer may be given: of a
    new entry, and the range of the middle half of those that learned. None: no similarity is enough yet.
    """

    lookups: int
    expected_wrong_percent: float
    bound_percent: float
    entries: int
    compared: int
    agreed: int
    new_entry_threshold: float | None
    thresholds: tuple[float, float] | None


class CacheReport(msgspec.Struct, frozen=True, kw_only=True):
    """Cover the last `DAYS`. ``saved_nanousd`` counts parts that were known too, ``hits`` whole answers alone."""

    requests: int
    hits: int
    saved_nanousd: int
    levels: list[LevelLine]
    semantic: SemanticReport | None

    @property
    def hit_percent(self) -> float:
        return 100 * self.hits / self.requests if self.requests else 0.0


def build(organization: Organization) -> CacheReport:
    """Sum it up. I/O: one SQL statement, four more where alike questions share answers."""
    since = timezone.now() - timedelta(days=DAYS)
    found = UsageRecord.objects.filter(organization_id=organization.public_id, occurred_at__gte=since)
    rows = {
        row["cache"]: row
        for row in found.values("cache").annotate(requests=Count("pk"), saved=Sum("saved_nanousd")).order_by()
    }
    levels = [
        LevelLine(level=level, requests=rows[level]["requests"], saved_nanousd=int(rows[level]["saved"]))
        for level in LEVELS
        if level in rows
    ]
    return CacheReport(
        requests=sum(row["requests"] for row in rows.values()),
        hits=sum(line.requests for line in levels),
        saved_nanousd=int(sum(row["saved"] for row in rows.values())),
        levels=levels,
        semantic=_report_semantic(organization) if organization.semantic_cache else None,
    )


def _report_semantic(organization: Organization) -> SemanticReport:
    account = SemanticAccount.objects.filter(pk=organization.public_id).first() or SemanticAccount()
    entries = SemanticEntry.objects.filter(organization_id=organization.public_id, expires_at__gt=timezone.now())
    observed = [
        lessons.read_observations(entry)
        for entry in entries.exclude(observations=[]).only("observations").order_by("-pk")[:ENTRIES_LOOKED_AT]
    ]
    rate, prior = float(organization.semantic_max_error_percent) / 100, thresholds.unpack_prior(bytes(account.prior))
    learned = sorted(found for each in observed if (found := thresholds.find_threshold(each, prior, rate)) is not None)
    results = [is_right for each in observed for _, is_right in each]
    return SemanticReport(
        lookups=round(account.lookups),
        expected_wrong_percent=100 * account.spent / account.lookups if account.lookups else 0.0,
        bound_percent=float(organization.semantic_max_error_percent),
        entries=entries.count(),
        compared=len(results),
        agreed=sum(results),
        new_entry_threshold=thresholds.find_threshold([], prior, rate),
        thresholds=(learned[len(learned) // 4], learned[3 * len(learned) // 4]) if learned else None,
    )
