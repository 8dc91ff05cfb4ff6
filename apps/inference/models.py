"""Keep the catalog: what is served. Prices are `apps.spend.models.Price`, by the model's slug."""

from django.db import models

from aiscale.db import Row


class Model(Row):
    """Offer one model. ``version`` names the converted files below the models directory that requests are made for."""

    PUBLIC_ID_PREFIX = "mdl"

    class Kind(models.TextChoices):
        GENERATE = "generate", "chat and completions"
        EMBED = "embed", "embeddings"

    slug = models.SlugField("name in requests", max_length=100, unique=True)
    name = models.CharField(max_length=120)
    kind = models.CharField(max_length=16, choices=Kind.choices)
    version = models.CharField(max_length=64)
    description = models.CharField(max_length=300, blank=True)
    is_enabled = models.BooleanField(default=True, help_text="A model that is not enabled does not exist for callers.")
    context_tokens = models.PositiveIntegerField("context, tokens")
    dimensions = models.PositiveIntegerField(default=0)

    class Meta:
        constraints = [
            models.CheckConstraint(name="model_context_is_possible", condition=models.Q(context_tokens__gte=1))
        ]

    def __str__(self) -> str:
        return self.slug
