"""Find the versions of a message, and show another one: the talk is then what it was when that one was last part of it."""

from collections import defaultdict

import msgspec
from django.db import transaction

from aiscale.errors import AiscaleError, Code
from apps.chat import turns
from apps.chat.models import Conversation, Message


def list_versions(conversation_id: str) -> dict[str, tuple[str, ...]]:
    """Return, for each message that has versions, the ids of all of them, itself included, the oldest first. All ids are public.

    I/O: one SQL statement where nothing was replaced, else two.
    """
    said = Message.objects.filter(conversation__public_id=conversation_id)
    if not said.exclude(replaced_by=None).exists():
        return {}
    groups: dict[int, list[str]] = defaultdict(list)
    for public_id, parent in said.with_parent().order_by("position").values_list("public_id", "parent"):
        groups[parent].append(public_id)
    return {each: tuple(ids) for ids in groups.values() if len(ids) > 1 for each in ids}


class Shown(msgspec.Struct, frozen=True):
    """Say what a talk is after a version was shown. All ids are public."""

    conversation_id: str
    title: str
    last_id: str


def show(user_id: str, message_id: str) -> Shown:
    """Make a version part of the talk, with what followed it when it was last shown. Showing what is shown changes nothing.

    I/O: one transaction. Raises: AiscaleError (NOT_FOUND; INVALID_REQUEST while an answer is made, or when what it follows is not shown).
    """
    with transaction.atomic():
        own = turns.find_message(user_id, message_id)
        if own is None:
            raise AiscaleError(Code.NOT_FOUND, "This message does not exist.", param="message_id")
        conversation = turns.lock_idle(own.conversation.user_id, own.conversation.public_id)
        said = conversation.messages
        said.fill_parents()
        # read again, as it is under the lock
        chosen = said.get(pk=own.pk)
        if chosen.replaced_by is not None:
            _put_back(conversation, chosen)
        last = said.filter(replaced_by=None).order_by("-position").values_list("public_id", flat=True)[0]
        return Shown(conversation.public_id, conversation.title, last)


def _put_back(conversation: Conversation, chosen: Message) -> None:
    said, parent = conversation.messages, chosen.parent_position
    standing = said.filter(replaced_by=None)
    assert parent is not None, "filled under the same lock"
    if parent >= 0 and not standing.filter(position=parent).exists():
        message = "What this message follows is not shown any more. Reload the page."
        raise AiscaleError(Code.INVALID_REQUEST, message, param="message_id")
    # what was put away together comes back together
    branch = [chosen]
    for row in said.filter(replaced_by=chosen.replaced_by, position__gt=chosen.position).order_by("position"):
        if row.parent_position == branch[-1].position:
            branch.append(row)
    leaving = standing.filter(position__gt=parent).order_by("position")
    shown = leaving.first()
    leaving.update(replaced_by=chosen.position)
    said.filter(pk__in=[row.pk for row in branch]).update(replaced_by=None)
    if shown is not None and parent < 0:
        turns.retitle(conversation, shown.content, chosen.content)
