"""Keep the catalog: what is served. Prices are `apps.spend.models.Price`, by the model's slug."""

from django.db import models

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
    size_bytes = models.PositiveBigIntegerField(default=0)
    source = models.CharField(max_length=300, blank=True)
    license = models.CharField(max_length=100, blank=True)
    takes_chats = models.BooleanField(default=False)
    weight = models.PositiveSmallIntegerField("of 100 requests", default=0)
    canary_since = models.DateTimeField(null=True, blank=True)
    rolled_back_at = models.DateTimeField(null=True, blank=True)
    rolled_back_because = models.CharField(max_length=300, blank=True)
    alert_due = models.BooleanField(default=False)
    """Whether the staff are still to be told that it was rolled back."""

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
