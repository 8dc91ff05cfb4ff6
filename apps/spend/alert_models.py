"""Keep where alerts go, and which of them have arrived."""

from django.contrib.humanize.templatetags.humanize import ordinal
from django.db import models
from django.db.models import Q
from django.db.models.functions import Now

from aiscale.db import Row


class WebhookEndpoint(Row):
    """Name a URL that is told of alerts: of one organization, or (without one) of the whole site. The secret signs what is sent."""

    PUBLIC_ID_PREFIX = "whe"

    organization = models.ForeignKey(
        "accounts.Organization", on_delete=models.CASCADE, null=True, blank=True, related_name="webhook_endpoints"
    )
    url = models.URLField(
        "URL",
        max_length=500,
        help_text="It is told by POST, signed as Standard Webhooks are. An organization's may not be a private address.",
    )
    sealed_secret = models.TextField(editable=False)
    sealed_old_secret = models.TextField(blank=True, db_default="", default="", editable=False)
    """The one before, which signs too until ``old_secret_until``: nobody misses a message while they change it."""
    old_secret_until = models.DateTimeField(null=True, blank=True, editable=False)
    is_active = models.BooleanField("active", default=True, help_text="Its organization pauses and resumes it, too.")
    is_blocked = models.BooleanField(
        "blocked", default=False, db_default=False, help_text="Nothing is sent, and its organization cannot resume it."
    )
    last_result = models.CharField(max_length=200, blank=True, editable=False)
    last_tried_at = models.DateTimeField(null=True, blank=True, editable=False)

    def __str__(self) -> str:
        return self.url

    @property
    def is_told(self) -> bool:
        """Tell whether messages are sent to it."""
        return self.is_active and not self.is_blocked


class AlertDelivery(models.Model):
    """Be one message that is owed: an alert to one mail address or one endpoint. It is its own outbox: what failed is due again."""

    alert = models.ForeignKey("spend.SpendAlert", on_delete=models.CASCADE, related_name="deliveries")
    endpoint = models.ForeignKey(WebhookEndpoint, on_delete=models.CASCADE, null=True, blank=True)
    email = models.EmailField(blank=True)
    attempts = models.PositiveIntegerField(default=0)
    due_at = models.DateTimeField(null=True)
    """When it is tried next; null once it has arrived, or was given up."""
    delivered_at = models.DateTimeField(null=True)
    error = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        verbose_name_plural = "alert deliveries"
        constraints = [
            models.UniqueConstraint(
                fields=["alert", "endpoint", "email"], name="alert_delivery_once", nulls_distinct=False
            ),
        ]
        indexes = [models.Index(fields=["due_at"], condition=Q(due_at__isnull=False), name="alert_delivery_due")]

    def __str__(self) -> str:
        return f"{self.alert} to {self.email or self.endpoint}"

    def describe(self) -> str:
        """Say what became of it."""
        if self.delivered_at is not None:
            return f"arrived {self.delivered_at:%Y-%m-%d %H:%M} UTC" + (
                f" at the {ordinal(self.attempts)} try" if self.attempts > 1 else ""
            )
        if not self.attempts:
            return "about to be sent"
        if self.due_at is None:
            return f"given up: {self.error}"
        tries = "once" if self.attempts == 1 else f"{self.attempts} times, last"
        return f"tried {tries}: {self.error}; again {self.due_at:%Y-%m-%d %H:%M} UTC"
