"""Say what chat keeps of a person: what they said, what was answered, and what they want to be heeded (`apps.accounts.personal_data`)."""

from collections.abc import Iterator
from typing import Any

from django.db import transaction
from django.db.models import QuerySet

from apps.accounts.models import Organization, User
from apps.chat import departures, instructions
from apps.chat.models import Conversation, Message, PersonalInstructions


def export(user: User) -> Iterator[tuple[str, Any]]:
    """Yield the person's instructions, and the conversations that they see in the chat, each with its messages."""
    yield "instructions", instructions.read(user.public_id)
    yield "conversations", _iter_conversations(user)


def forget_person(user: User, addresses: set[str]) -> None:
    """Delete all that they said, and end what is being answered. I/O: SQL; Redis trips after the commit."""
    PersonalInstructions.objects.filter(user=user).delete()
    _forget(Conversation.objects.filter(user=user))


def forget_organization(organization: Organization) -> None:
    """Delete all that was said in it. I/O: as `forget_person`."""
    _forget(Conversation.objects.filter(organization=organization))


def _forget(conversations: QuerySet[Conversation]) -> None:
    pending = Message.objects.filter(conversation__in=conversations, status=Message.Status.PENDING)
    job_ids = [str(job_id) for job_id in pending.values_list("job_id", flat=True) if job_id]
    conversations.delete()
    if job_ids:
        transaction.on_commit(lambda: departures.cancel_all(job_ids))


def _iter_conversations(user: User) -> Iterator[dict[str, Any]]:
    for conversation in Conversation.objects.list_of(user.pk).select_related("organization").iterator():
        yield {
            "id": conversation.public_id,
            "organization_id": conversation.organization.public_id,
            "title": conversation.title,
            "model": conversation.model,
            "created_at": conversation.created_at,
            "messages": [
                {"role": each.role, "content": each.content, "status": each.status, "created_at": each.created_at}
                for each in conversation.messages.order_by("position")
            ],
        }
