"""Keep where alerts go, and which of them have arrived."""

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
    url = models.URLField(max_length=500)
    sealed_secret = models.TextField(editable=False)
    is_active = models.BooleanField(default=True)
    last_result = models.CharField(max_length=200, blank=True, editable=False)
    last_tried_at = models.DateTimeField(null=True, blank=True, editable=False)

    def __str__(self) -> str:
        return self.url


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
