"""Write a conversation as a file that its owner can keep: Markdown to read, JSON for programs."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from django.db.models import QuerySet

from apps.chat.models import Conversation, Message

SPEAKERS = {Message.Role.USER.value: "You", Message.Role.ASSISTANT.value: "Answer"}


def write_markdown(conversation: Conversation) -> Iterator[str]:
    """Yield what was said, without what was replaced. I/O: SQL, in pieces."""
    yield f"# {conversation.title}\n\n{conversation.created_at:%Y-%m-%d %H:%M} UTC, model {conversation.model}\n"
    for row in _iter_rows(conversation, replaced_by=None):
        yield f"\n## {SPEAKERS[row.role]}\n\n{row.content.strip() or _describe_nothing(row)}\n"


def write_json(conversation: Conversation) -> Iterator[str]:
    """Yield all messages, those that were replaced included; ``follows`` is the id of the message that each one came after.

    I/O: SQL, in pieces.
    """
    head = {"id": conversation.public_id, "title": conversation.title, "model": conversation.model}
    head["created_at"] = conversation.created_at.isoformat()
    yield json.dumps(head, ensure_ascii=False)[:-1] + ', "messages": ['
    ids: dict[int, str] = {}
    for row in _iter_rows(conversation):
        told = _describe(row) | {"follows": ids.get(row.parent)}
        yield (",\n" if ids else "\n") + json.dumps(told, ensure_ascii=False)
        ids[row.position] = row.public_id
    yield "\n]}\n"


FORMATS: dict[str, tuple[Callable[[Conversation], Iterator[str]], str, str]] = {
    "markdown": (write_markdown, "text/markdown; charset=utf-8", "md"),
    "json": (write_json, "application/json", "json"),
}
"""Writer, content type and ending of each format."""


def _iter_rows(conversation: Conversation, **only: Any) -> Iterator[Any]:
    rows: QuerySet[Message] = conversation.messages.with_parent().filter(**only)
    return rows.order_by("position").iterator(chunk_size=200)


def _describe(row: Message) -> dict[str, Any]:
    return {
        "id": row.public_id,
        "role": row.role,
        "content": row.content,
        "status": row.status,
        "error": {"code": row.error_code, "message": row.error_message} if row.error_code else None,
        "was_replaced": row.replaced_by is not None,
        "created_at": row.created_at.isoformat(),
    }


def _describe_nothing(row: Message) -> str:
    return f"*{row.error_message or row.get_status_display()}*"
