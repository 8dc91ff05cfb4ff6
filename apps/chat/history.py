"""Read what a model is told of a conversation: the talk as it stands, as far as it fits."""

from typing import Any

from apps.accounts import callers
from apps.accounts.callers import on_thread
from apps.chat import instructions
from apps.chat.models import Message
from apps.inference import catalog, completions, prompts
from apps.inference.catalog import CatalogModel
from apps.inference.completions import CompletionRequest
from apps.inference.prompts import ChatMessage
from apps.inference.upstream_words import bound_prompt_tokens

HISTORY_MESSAGES = 60
ANSWER_SHARE = 4
"""A quarter of the context, at the least, is left to the answer; older turns make room for it."""


async def fit(conversation_id: str, answer_id: str, model_slug: str, plan_slug: str, user_id: str) -> list[ChatMessage]:
    """Return the talk before an answer, without the oldest turns that no longer fit, after what the user wants all chats to heed.

    I/O: two SQL statements, and as `catalog.get_model`. Raises: AiscaleError (MODEL_NOT_FOUND).
    """
    history = await on_thread(lambda: read(conversation_id, answer_id))
    model, plan = await catalog.get_model(model_slug, "generate"), await callers.get_plan(plan_slug)
    context = completions.count_context_tokens(model, plan)
    room = context - min(plan.max_output_tokens, context // ANSWER_SHARE)
    preface = await instructions.make_preface(user_id, model)
    while len(history) > 1 and await _count_tokens(model, preface.add(history)) > room:
        # a question goes together with its answer
        del history[:2]
    return preface.add(history)


async def _count_tokens(model: CatalogModel, messages: list[ChatMessage]) -> int:
    """Count a prompt's tokens; for an upstream, whose tokenizer is not here, the most that they can be."""
    if model.upstream is None:
        return len(await prompts.build_prompt(model, messages))
    return bound_prompt_tokens(CompletionRequest(request_id="", source="chat", model=model.slug, messages=messages))


def read(conversation_id: str, answer_id: str) -> list[ChatMessage]:
    """Return the messages of the talk but the answer that is to be made, in turns that alternate. I/O: one SQL statement."""
    rows: Any = (
        Message.objects.filter(conversation__public_id=conversation_id, replaced_by=None)
        .exclude(public_id=answer_id)
        .order_by("-position")
        .values_list("role", "content")[:HISTORY_MESSAGES]
    )
    pairs = [(role, content) for role, content in reversed(rows) if content]
    history: list[ChatMessage] = []
    for role, content in pairs:
        if history and history[-1].role == role:
            # a question whose answer never came: templates want turns to alternate
            history.pop()
        history.append(ChatMessage(role=role, content=content))
    while history and history[0].role == Message.Role.ASSISTANT:
        del history[0]
    return history
