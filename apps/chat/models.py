"""Keep what was said."""

from typing import Any

from django.conf import settings
from django.db import models
from django.db.models import OuterRef, Q, Subquery, Value
from django.db.models.functions import Coalesce

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


PLACE = models.IntegerField()


class MessageQuerySet(models.QuerySet["Message"]):
    def with_parent(self) -> Any:
        """Annotate ``parent``: the position of the message that each one follows, -1 where it begins the talk."""
        return self.annotate(parent=Coalesce("parent_position", _make_parent(), output_field=PLACE))

    def fill_parents(self) -> None:
        """Write ``parent_position`` where it is not written yet. I/O: one SQL statement."""
        self.filter(parent_position=None).update(parent_position=_make_parent())


def _make_parent() -> Coalesce:
    """Tell what a message followed from what was replaced: the last one before it that stood when it was written."""
    before = Message.objects.filter(conversation=OuterRef("conversation"), position__lt=OuterRef("position"))
    stood = before.filter(Q(replaced_by=None) | Q(replaced_by__gt=OuterRef("position"))).order_by("-position")
    return Coalesce(Subquery(stood.values("position")[:1]), Value(-1), output_field=PLACE)


class Message(Row):
    """Hold one turn. ``position`` counts from 0 in its conversation; an answer has the ``job_id`` that makes it.

    A message that was asked anew is kept: ``replaced_by`` is then the position of what was put in its place, and it is not part of the
    talk, until it is shown again (`apps.chat.versions`). Those without ``replaced_by`` are the talk, in the order of their positions.
    Messages that follow the same one are versions of each other. ``parent_position`` is None until versions are switched for the first
    time; what it will be is told by ``replaced_by`` until then (`MessageQuerySet.with_parent`).
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
    parent_position = models.IntegerField(null=True, blank=True)

    objects = MessageQuerySet.as_manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["conversation", "position"], name="message_place")]
        indexes = [
            models.Index(fields=["created_at"], name="message_pending", condition=Q(status="pending")),
        ]

    def __str__(self) -> str:
        return self.public_id
