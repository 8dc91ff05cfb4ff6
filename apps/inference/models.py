"""Keep the catalog: what is served. Prices are `apps.spend.models.Price`, by the model's slug."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from django.db import models
from django.utils import timezone
from pgvector.django import CosineDistance, VectorField

from aiscale import sealing
from aiscale.db import Row


class Upstream(Row):
    """Know another OpenAI-compatible server. Its key is kept sealed (``aiscale.sealing``)."""

    PUBLIC_ID_PREFIX = "ups"

    name = models.SlugField(max_length=64, unique=True, help_text="Kill switches name it: provider:<name>.")
    base_url = models.URLField("base URL", max_length=300, help_text="Up to and with /v1.")
    sealed_key = models.TextField(blank=True, editable=False)
    is_enabled = models.BooleanField(default=True)
    timeout_s = models.PositiveSmallIntegerField("longest silence, seconds", default=60)
    retries = models.PositiveSmallIntegerField("retries before the first byte", default=2)

    class Meta:
        constraints = [
            models.CheckConstraint(
                name="upstream_is_possible",
                condition=models.Q(timeout_s__gte=1, timeout_s__lte=3600, retries__lte=5) & ~models.Q(name="local"),
            )
        ]

    def __str__(self) -> str:
        return self.name

    def set_key(self, key: str) -> None:
        self.sealed_key = sealing.seal(key) if key else ""


class Model(Row):
    """Offer one model. ``version`` names the converted files below the models directory that requests are made for."""

    PUBLIC_ID_PREFIX = "mdl"

    class Kind(models.TextChoices):
        GENERATE = "generate", "chat and completions"
        EMBED = "embed", "embeddings"
        CLASSIFY = "classify", "moderations"

    slug = models.SlugField("name in requests", max_length=100, unique=True)
    name = models.CharField(max_length=120)
    kind = models.CharField(max_length=16, choices=Kind.choices)
    version = models.CharField(max_length=64)
    previous_version = models.CharField(max_length=64, blank=True, db_default="", editable=False)
    """The one before `version`: what a roll-back without a canary returns to."""
    description = models.CharField(max_length=300, blank=True)
    is_enabled = models.BooleanField(default=True, help_text="A model that is not enabled does not exist for callers.")
    context_tokens = models.PositiveIntegerField("context, tokens")
    dimensions = models.PositiveIntegerField(default=0)

    upstream = models.ForeignKey(
        Upstream, on_delete=models.PROTECT, null=True, blank=True, help_text="Who serves it; empty: our own workers."
    )
    upstream_model = models.CharField("its name there", max_length=200, blank=True, db_default="")
    fallback = models.ForeignKey(
        "self",
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="+",
        limit_choices_to={"upstream__isnull": False, "kind": "generate"},
        help_text="A model of an upstream that answers, at its own price, when this one has no worker or no room.",
    )

    class Meta:
        constraints = [
            models.CheckConstraint(name="model_context_is_possible", condition=models.Q(context_tokens__gte=1)),
            models.CheckConstraint(
                name="model_upstream_is_whole",
                condition=models.Q(upstream__isnull=True)
                | (~models.Q(upstream_model="") & models.Q(kind__in=["generate", "embed"])),
            ),
        ]

    def __str__(self) -> str:
        return self.slug


class ModelVersion(Row):
    """Know one version of a model: what its files are, and how many of a hundred requests it gets beside the main one.

    Written by `apps.inference.traffic` and `apps.inference.entries` alone.
    """

    PUBLIC_ID_PREFIX = "mdv"

    model = models.ForeignKey(Model, on_delete=models.CASCADE, related_name="versions")
    version = models.CharField(max_length=64)
    precision = models.CharField(max_length=8)
    batch_invariant = models.BooleanField("batch-invariant", default=False)
    context_tokens = models.PositiveIntegerField("context, tokens")
    dimensions = models.PositiveIntegerField(default=0, db_default=0)
    size_bytes = models.PositiveBigIntegerField(default=0)
    source = models.CharField(max_length=300, blank=True)
    license = models.CharField(max_length=100, blank=True)
    takes_chats = models.BooleanField(default=False)
    weight = models.PositiveSmallIntegerField("of 100 requests", default=0)
    canary_since = models.DateTimeField(null=True, blank=True)
    rolled_back_at = models.DateTimeField(null=True, blank=True)
    rolled_back_because = models.CharField(max_length=300, blank=True)
    alert_due = models.BooleanField(default=False)
    """Whether the staff are still to be mailed that it was rolled back."""
    webhooks_owed = models.TextField(blank=True, default="", db_default="", editable=False)
    """The public ids of the endpoints that are still to be told, with spaces between (`rollback_alerts`)."""
    webhooks_due_at = models.DateTimeField(null=True, blank=True, editable=False)
    """When they are tried next."""
    webhook_attempts = models.PositiveSmallIntegerField(default=0, db_default=0, editable=False)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["model", "version"], name="model_version_is_one"),
            models.CheckConstraint(name="model_version_weight_is_possible", condition=models.Q(weight__lte=99)),
        ]

    def __str__(self) -> str:
        return f"{self.model.slug} {self.version}"


class ModerationFlag(Row):
    """Note that a message was flagged or refused: who sent it and for what, never what it said. Written by `screening` alone.

    Identities are public ids in plain text, so that a note outlives what it names.
    """

    PUBLIC_ID_PREFIX = "flag"

    class Action(models.TextChoices):
        FLAG = "flag", "passed on"
        BLOCK = "block", "refused"

    organization_id = models.CharField(max_length=40)
    user_id = models.CharField(max_length=40, blank=True)
    key_id = models.CharField(max_length=40, blank=True)
    request_id = models.CharField(max_length=128)
    source = models.CharField(max_length=16)
    model = models.CharField(max_length=128)
    action = models.CharField(max_length=16, choices=Action.choices)
    labels = models.JSONField(default=list)

    class Meta:
        indexes = [
            models.Index(fields=["-created_at"], name="flag_by_time"),
            models.Index(fields=["organization_id", "-created_at"], name="flag_by_organization"),
        ]

    def __str__(self) -> str:
        return f"{self.request_id}: {', '.join(self.labels)}"


class CachedAnswerQuerySet(models.QuerySet["CachedAnswer"]):
    def find(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """Return the values of those keys that are there and have not expired. I/O: one SQL statement."""
        rows = self.filter(key__in=keys, expires_at__gt=timezone.now()).values_list("key", "value")
        return {bytes(key): bytes(value) for key, value in rows}

    def keep(self, rows: Iterable[tuple[bytes, bytes, str, str]], ttl_s: float) -> None:
        """Write (key, value, model, scope) rows, in the order of their keys: two writers cannot deadlock. I/O: one SQL statement."""
        expires_at = timezone.now() + timedelta(seconds=ttl_s)
        self.bulk_create(
            [
                CachedAnswer(key=key, value=value, model=model, scope=scope, expires_at=expires_at)
                for key, value, model, scope in sorted(rows)
            ],
            update_conflicts=True,
            unique_fields=["key"],
            update_fields=["value", "expires_at"],
        )

    def delete_expired(self, limit: int = 5_000) -> int:
        """Delete some of what has expired. I/O: one SQL statement. Returns how many rows went."""
        expired = self.filter(expires_at__lte=timezone.now()).values("key")[:limit]
        return self.filter(key__in=expired).delete()[0]


class CachedAnswer(models.Model):
    """Hold one answer at level 3 of the cache (`apps.inference.cache`). ``key`` is all that finds it."""

    key = models.BinaryField(primary_key=True, max_length=32)
    value = models.BinaryField()
    model = models.CharField(max_length=100)
    scope = models.CharField(max_length=80)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(db_index=True)

    objects = CachedAnswerQuerySet.as_manager()

    class Meta:
        indexes = [models.Index(fields=["scope"], name="cached_answer_by_scope")]

    def __str__(self) -> str:
        return bytes(self.key).hex()[:12]


class CacheGeneration(models.Model):
    """Count how often the cached answers of ``scope`` (``site``, ``model:<slug>``, ``organization:<id>``) were purged."""

    scope = models.CharField(max_length=160, unique=True)
    number = models.PositiveBigIntegerField(default=0)
    purged_at = models.DateTimeField(auto_now=True)

    class Meta:
        verbose_name = "purge of known answers"
        verbose_name_plural = "purges of known answers"

    def __str__(self) -> str:
        return f"{self.scope}: {self.number}"


class SemanticEntryQuerySet(models.QuerySet["SemanticEntry"]):
    def find_nearest(self, place: dict[str, Any], vector: Any) -> "SemanticEntry | None":
        """Return the entry whose prompt is most alike, with its ``similarity``, of exactly this place: its organization, model, version
        and context. I/O: two SQL statements, of which the first looks at each entry of the place and at no other."""
        here = self.filter(**place, expires_at__gt=timezone.now())
        # with nothing else to carry along it takes two thirds of the time
        ranked = here.annotate(distance=CosineDistance("vector", vector)).order_by("distance")
        nearest = ranked.values_list("pk", "distance").first()
        if nearest is None:
            return None
        entry = self.filter(pk=nearest[0]).defer("vector").first()
        if entry is not None:
            entry.similarity = 1.0 - nearest[1]  # type: ignore[attr-defined]
        return entry

    def delete_expired(self, limit: int = 5_000) -> int:
        """Delete some of what has expired. I/O: one SQL statement. Returns how many rows went."""
        expired = self.filter(expires_at__lte=timezone.now()).values("pk")[:limit]
        return self.filter(pk__in=expired).delete()[0]

    def trim(self, most: int) -> None:
        """Keep the newest ``most`` of each organization. I/O: SQL."""
        counted = self.values("organization_id").annotate(entries=models.Count("pk")).filter(entries__gt=most)
        for organization_id in counted.values_list("organization_id", flat=True):
            own = self.filter(organization_id=organization_id)
            oldest_kept = own.order_by("-pk").values_list("pk", flat=True)[most - 1]
            own.filter(pk__lt=oldest_kept).delete()


class SemanticEntry(models.Model):
    """Hold an answer that is given again to prompts which are alike (`apps.inference.cache.semantic`), and what it taught.

    ``context`` stands for all of the request but its last message; ``vector`` is that message. What was asked is not kept.
    """

    organization_id = models.CharField(max_length=40)
    model = models.CharField(max_length=100)
    version = models.CharField(max_length=64)
    context = models.BinaryField(max_length=32)
    vector = VectorField(dimensions=384)
    value = models.BinaryField()
    observations = models.JSONField(default=list)
    """[similarity, whether it was right], the oldest first."""
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(db_index=True)

    objects = SemanticEntryQuerySet.as_manager()

    class Meta:
        indexes = [
            models.Index(fields=["organization_id", "model", "version", "context"], name="semantic_entry_by_place")
        ]

    def __str__(self) -> str:
        return f"{self.organization_id} {self.pk}"


class SemanticAccount(models.Model):
    """Count an organization's semantic look-ups, the risk that its reuses took, and what its entries taught together (``prior``)."""

    organization_id = models.CharField(max_length=40, primary_key=True)
    lookups = models.FloatField(default=0.0)
    spent = models.FloatField(default=0.0)
    prior = models.BinaryField(default=bytes)

    def __str__(self) -> str:
        return self.organization_id
