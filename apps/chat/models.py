"""Keep what was said."""

from django.conf import settings
from django.db import models
from django.db.models import Q

from aiscale.db import Row
from apps.accounts.models import Organization


class ConversationQuerySet(models.QuerySet["Conversation"]):
    def list_of(self, user_id: int) -> "ConversationQuerySet":
        """List a user's conversations, the one that was used last first: those of organizations that the user is still in."""
        mine = self.filter(user_id=user_id, deleted_at=None, organization__memberships__user_id=user_id)
        return mine.order_by("-used_at", "-id")


class Conversation(Row):
    """Hold one user's talk with one model at a time. A deleted one is emptied at once and kept as a row without text."""

    PUBLIC_ID_PREFIX = "conv"

    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="conversations")
    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="conversations")
    title = models.CharField(max_length=120)
    model = models.CharField(max_length=100)
    used_at = models.DateTimeField()
    deleted_at = models.DateTimeField(null=True, blank=True)

    objects = ConversationQuerySet.as_manager()

    class Meta:
        indexes = [
            models.Index(fields=["user", "-used_at", "-id"], name="conversation_list", condition=Q(deleted_at=None))
        ]

    def __str__(self) -> str:
        return self.public_id


class PersonalInstructions(models.Model):
    """Hold what a person wants all their chats to know or heed. No row: nothing."""

    user = models.OneToOneField(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="instructions", primary_key=True
    )
    text = models.TextField()
    updated_at = models.DateTimeField(auto_now=True)

    def __str__(self) -> str:
        return f"instructions of {self.user_id}"


class Message(Row):
    """Hold one turn. ``position`` counts from 0 in its conversation; an answer has the ``job_id`` that makes it.

    A message that was asked anew is kept: ``replaced_by`` is then the position of what stands in its place, and it is no longer part of
    the talk.
    """

    PUBLIC_ID_PREFIX = "msg"

    class Role(models.TextChoices):
        USER = "user"
        ASSISTANT = "assistant"

    class Status(models.TextChoices):
        PENDING = "pending"
        COMPLETE = "complete"
        STOPPED = "stopped"
        FAILED = "failed"

    conversation = models.ForeignKey(Conversation, on_delete=models.CASCADE, related_name="messages")
    position = models.PositiveIntegerField()
    role = models.CharField(max_length=16, choices=Role.choices)
    content = models.TextField(blank=True)
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.COMPLETE)
    job_id = models.CharField(max_length=40, null=True, blank=True, unique=True)
    client_key = models.CharField(max_length=120, null=True, blank=True, unique=True)
    """The sender's id and the browser's own id of a message: one that is sent twice is there once."""
    error_code = models.CharField(max_length=40, blank=True)
    error_message = models.CharField(max_length=500, blank=True)
    completion_tokens = models.PositiveIntegerField(default=0)
    replaced_by = models.PositiveIntegerField(null=True, blank=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["conversation", "position"], name="message_place")]
        indexes = [
            models.Index(fields=["created_at"], name="message_pending", condition=Q(status="pending")),
        ]

    def __str__(self) -> str:
        return self.public_id
