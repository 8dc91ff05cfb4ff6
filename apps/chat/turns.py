"""Begin a turn: write down what was said before anything is asked of a model, then ask.

Whatever dies afterwards, the question is kept, and transcripts or the sweep write how its answer ended.
"""

from collections.abc import Callable

import msgspec
from django.db import IntegrityError, transaction
from django.db.models import OuterRef, Subquery, Value
from django.db.models.functions import Coalesce
from django.utils import timezone

from aiscale.db import make_public_id
from aiscale.errors import AiscaleError, Code
from apps.accounts import callers, organizations, roles
from apps.accounts.callers import on_thread
from apps.accounts.models import Organization, User
from apps.accounts.organizations import ensure_personal_organization
from apps.accounts.roles import Right
from apps.chat import history
from apps.chat.models import Conversation, Message
from apps.inference import catalog, completions
from apps.inference.catalog import CatalogModel
from apps.inference.completions import CompletionRequest, Run
from apps.spend import refusal_log

MAX_TEXT_CHARS = 32_000
TITLE_CHARS = 60


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """Name what one question brought about. All ids are public."""

    conversation_id: str
    organization_id: str
    title: str
    model: str
    question_id: str
    text: str
    answer_id: str
    job_id: str
    repeated: bool
    """This question had been sent before: its answer is there, or on its way."""
    replaced: tuple[str, ...] = ()
    """The messages that are no longer part of the talk, because this turn stands in their place."""


async def begin(
    user_id: str,
    conversation_id: str | None,
    model: str,
    text: str,
    client_id: str,
    organization_id: str | None = None,
    replaces: str | None = None,
) -> Turn:
    """Write the question and its answer to be, in one transaction. A new conversation belongs to ``organization_id``, by default the
    user's personal one. ``replaces`` is a question of the conversation that this one stands in for.

    I/O: SQL. Raises: AiscaleError (INVALID_REQUEST, NOT_FOUND for a conversation, question or organization that is not this user's,
    PERMISSION_DENIED for a role that may not chat, MODEL_NOT_FOUND).
    """
    check_text(text)
    chosen = await _choose(model)
    return await on_thread(
        lambda: _begin(user_id, conversation_id, chosen.slug, text, client_id, organization_id, replaces)
    )


async def retry(user_id: str, message_id: str, model: str, client_id: str) -> Turn:
    """Ask for the last answer of a conversation again. The one that was there is kept, out of the talk.

    I/O: SQL. Raises: AiscaleError, as `begin`.
    """
    chosen = await _choose(model)
    return await on_thread(lambda: _retry(user_id, message_id, chosen.slug, client_id))


async def _choose(model: str) -> CatalogModel:
    try:
        return await catalog.get_model(model, "generate")
    except AiscaleError as error:
        if error.code is not Code.MODEL_NOT_FOUND:
            raise
        # a page shows the models that there were when it was loaded
        message = "This model is no longer offered. Reload the page and choose another one."
        raise AiscaleError(error.code, message, param="model") from error


def check_text(text: str) -> None:
    """Raise: AiscaleError (INVALID_REQUEST)."""
    if not text.strip():
        raise AiscaleError(Code.INVALID_REQUEST, "Write something first.", param="text")
    if len(text) > MAX_TEXT_CHARS:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"Your message has {len(text):,} characters; the most is {MAX_TEXT_CHARS:,}. Please shorten it.",
            param="text",
        )
    if "\x00" in text:
        raise AiscaleError(
            Code.INVALID_REQUEST, "Your message holds a NUL character. Remove it and send again.", param="text"
        )


async def launch(turn: Turn, user_id: str) -> Run:
    """Ask the model. A refusal is written to the answer's row before it is raised.

    I/O: SQL for the history, then as `completions.start`. Raises: AiscaleError.
    """
    caller, request_id = None, make_public_id("req")
    try:
        caller = await callers.get_by_user(user_id, turn.organization_id)
        messages = await history.fit(turn.conversation_id, turn.answer_id, turn.model, caller.plan, user_id)
        request = CompletionRequest(
            request_id=request_id,
            source="chat",
            model=turn.model,
            messages=messages,
            # the likeliest answer: small models, such as the bundled one, wander when they are asked for variety
            temperature=0.0,
            keep_log=True,
            job_id=turn.job_id,
        )
        return await completions.start(request, caller)
    except AiscaleError as error:
        failure = error
        refusal_log.note(request_id, error, source="chat", caller=caller, model=turn.model)
        await on_thread(lambda: fail(turn.job_id, failure))
        raise


def fail(job_id: str, error: AiscaleError) -> None:
    """Write that an answer never came. I/O: one SQL statement. One that has ended is left as it is."""
    Message.objects.filter(job_id=job_id, status=Message.Status.PENDING).update(
        status=Message.Status.FAILED,
        error_code=error.code.value,
        error_message=error.message[:500],
        updated_at=timezone.now(),
    )


def find_message(user_id: str, message_id: str) -> Message | None:
    """Return a user's own message, with its conversation, of an organization that they are still in. I/O: one SQL statement."""
    own = Message.objects.filter(
        conversation__user__public_id=user_id,
        conversation__deleted_at=None,
        conversation__organization__memberships__user__public_id=user_id,
    )
    return own.select_related("conversation").filter(public_id=message_id).first()


def find_answer(user_id: str, message_id: str) -> Message | None:
    """Return a user's own answer, as `find_message`. I/O: one SQL statement."""
    found = find_message(user_id, message_id)
    return found if found is not None and found.role == Message.Role.ASSISTANT else None


def find_turn(user_id: str, answer_id: str) -> Turn | None:
    """Return the turn that a user's own answer ends. I/O: up to four SQL statements."""
    answer = find_answer(user_id, answer_id)
    if answer is None:
        return None
    said = answer.conversation.messages
    question = _find_question(answer)
    if question is None:
        return None
    # its question stands in their place, or, tried again, the answer alone does
    places = (question.position, answer.position)
    replaced = tuple(said.filter(replaced_by__in=places).order_by("position").values_list("public_id", flat=True))
    return _describe(answer.conversation, question, answer, repeated=True, replaced=replaced)


def _find_question(answer: Message) -> Message | None:
    said = answer.conversation.messages
    return said.filter(position=said.with_parent().filter(pk=answer.pk).values("parent")[:1]).first()


def find_last(user_id: str, conversation_id: str) -> str | None:
    """Return the id of the last message of a user's own conversation ('' when it is empty); None when there is no such conversation.

    I/O: one SQL statement.
    """
    standing = Message.objects.filter(conversation=OuterRef("pk"), replaced_by=None).order_by("-position")
    own = Conversation.objects.filter(public_id=conversation_id, user__public_id=user_id, deleted_at=None)
    own = own.filter(organization__memberships__user__public_id=user_id)
    found = own.values_list(Coalesce(Subquery(standing.values("public_id")[:1]), Value("")), flat=True).first()
    return None if found is None else str(found)


def find_conversation(user_id: str, conversation_id: str) -> tuple[str, str] | None:
    """Return the organization's id and the title of a user's own conversation. I/O: one SQL statement."""
    own = Conversation.objects.filter(public_id=conversation_id, user__public_id=user_id, deleted_at=None)
    return own.values_list("organization__public_id", "title").first()


def _begin(
    user_id: str,
    conversation_id: str | None,
    model: str,
    text: str,
    client_id: str,
    organization_id: str | None = None,
    replaces: str | None = None,
) -> Turn:
    def write(user: User, client_key: str) -> Turn:
        conversation, position = _open(user, conversation_id, model, text, organization_id)
        replaced = _replace(conversation, replaces, position, text) if replaces is not None else ()
        return _write(conversation, position, text, client_key, replaced)

    return _write_once(user_id, client_id, write)


def _retry(user_id: str, message_id: str, model: str, client_id: str) -> Turn:
    def write(user: User, client_key: str) -> Turn:
        answer = find_answer(user_id, message_id)
        if answer is None:
            raise AiscaleError(Code.NOT_FOUND, "This message does not exist.", param="message_id")
        conversation, position = _open(user, answer.conversation.public_id, model, "", None)
        standing = conversation.messages.filter(replaced_by=None).order_by("-position")
        question, last = standing.filter(role=Message.Role.USER).first(), standing.first()
        if question is None or last is None or last.pk != answer.pk:
            message = "Only the last answer can be asked for again. Edit the question of an earlier one instead."
            raise AiscaleError(Code.INVALID_REQUEST, message, param="message_id")
        standing.filter(pk=answer.pk).update(replaced_by=position)
        again = _make_answer(conversation, position, client_key)
        return _describe(conversation, question, again, repeated=False, replaced=(answer.public_id,))

    return _write_once(user_id, client_id, write)


def _write_once(user_id: str, client_id: str, write: Callable[[User, str], Turn]) -> Turn:
    """Write a turn in one transaction; one that was written before is told again."""
    client_key = f"{user_id}:{client_id}"
    try:
        with transaction.atomic():
            # locked against a deletion of the account at the same moment, which would leave this turn behind
            user = User.objects.select_for_update(no_key=True).filter(public_id=user_id, is_active=True).first()
            if user is None:
                message = "This account is not active. Ask the administrator of this service."
                raise AiscaleError(Code.ACCOUNT_INACTIVE, message)
            return _find_known(client_key) or write(user, client_key)
    except IntegrityError:
        # the same message came twice at once
        known = _find_known(client_key)
        if known is None:
            raise
        return known


def _open(
    user: User, conversation_id: str | None, model: str, text: str, organization_id: str | None
) -> tuple[Conversation, int]:
    """Return the conversation, new or locked, and the position of what is said next. Raises: AiscaleError."""
    now = timezone.now()
    if conversation_id is None:
        if organization_id is None:
            organization_id = ensure_personal_organization(user).public_id
        organization = _check_right(user, organization_id)
        title = make_title(text)
        return Conversation.objects.create(
            user=user, organization=organization, title=title, model=model, used_at=now
        ), 0
    conversation = lock_idle(user.pk, conversation_id)
    _check_right(user, conversation.organization.public_id)
    last = conversation.messages.order_by("-position").first()
    conversation.model, conversation.used_at = model, now
    conversation.save(update_fields=["model", "used_at", "updated_at"])
    return conversation, last.position + 1 if last else 0


def lock_idle(user_pk: int, conversation_id: str) -> Conversation:
    """Return a user's own conversation, in which no answer is being made, locked until the transaction ends.

    I/O: two SQL statements. Raises: AiscaleError (NOT_FOUND, INVALID_REQUEST).
    """
    # the row's lock puts turns of two tabs one after the other
    own = Conversation.objects.select_for_update(of=("self",)).list_of(user_pk).select_related("organization")
    conversation = own.filter(public_id=conversation_id).first()
    if conversation is None:
        raise AiscaleError(Code.NOT_FOUND, "This conversation does not exist.", param="conversation_id")
    if conversation.messages.filter(status=Message.Status.PENDING).exists():
        raise AiscaleError(
            Code.INVALID_REQUEST, "Wait until the answer is finished, or stop it first.", param="conversation_id"
        )
    return conversation


def _check_right(user: User, organization_id: str) -> Organization:
    place = organizations.get_membership(user, organization_id)
    roles.check(place.role, Right.CHAT)
    return place.organization


def _replace(conversation: Conversation, message_id: str, by: int, text: str) -> tuple[str, ...]:
    """Take a question, and all that followed, out of the talk. Raises: AiscaleError (NOT_FOUND)."""
    standing = conversation.messages.filter(replaced_by=None).order_by("position")
    question = standing.filter(public_id=message_id, role=Message.Role.USER).first()
    if question is None:
        raise AiscaleError(Code.NOT_FOUND, "The question that you edit is no longer there.", param="replaces")
    if not standing.filter(position__lt=question.position).exists():
        retitle(conversation, question.content, text)
    later = standing.filter(position__gte=question.position)
    replaced = tuple(later.values_list("public_id", flat=True))
    later.update(replaced_by=by)
    return replaced


def _write(
    conversation: Conversation, position: int, text: str, client_key: str, replaced: tuple[str, ...] = ()
) -> Turn:
    question = Message.objects.create(
        conversation=conversation, position=position, role=Message.Role.USER, content=text, client_key=client_key
    )
    answer = _make_answer(conversation, position + 1)
    return _describe(conversation, question, answer, repeated=False, replaced=replaced)


def _make_answer(conversation: Conversation, position: int, client_key: str | None = None) -> Message:
    return Message.objects.create(
        conversation=conversation,
        position=position,
        role=Message.Role.ASSISTANT,
        status=Message.Status.PENDING,
        job_id=make_public_id("job"),
        client_key=client_key,
    )


def retitle(conversation: Conversation, was: str, now: str) -> None:
    """Name a conversation after what is now its first question, unless a person gave it a name. I/O: at most one SQL statement."""
    if conversation.title == make_title(was):
        conversation.title = make_title(now)
        conversation.save(update_fields=["title", "updated_at"])


def make_title(text: str) -> str:
    """Name a conversation after its first words."""
    line = " ".join(text.split())
    return line if len(line) <= TITLE_CHARS else line[:TITLE_CHARS].rsplit(" ", 1)[0] + "…"


def _find_known(client_key: str) -> Turn | None:
    first = Message.objects.select_related("conversation__organization").filter(client_key=client_key).first()
    if first is None:
        return None
    said = first.conversation.messages
    if first.role == Message.Role.USER:
        question, answer = first, said.get(position=first.position + 1)
    else:
        found = _find_question(first)
        if found is None:
            return None
        question, answer = found, first
    replaced = tuple(said.filter(replaced_by=first.position).order_by("position").values_list("public_id", flat=True))
    return _describe(first.conversation, question, answer, repeated=True, replaced=replaced)


def _describe(
    conversation: Conversation, question: Message, answer: Message, *, repeated: bool, replaced: tuple[str, ...]
) -> Turn:
    return Turn(
        conversation_id=conversation.public_id,
        organization_id=conversation.organization.public_id,
        title=conversation.title,
        model=conversation.model,
        question_id=question.public_id,
        text=question.content,
        answer_id=answer.public_id,
        job_id=answer.job_id or "",
        repeated=repeated,
        replaced=replaced,
    )
