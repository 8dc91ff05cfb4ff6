"""Keep what a person wants every chat of theirs to know or heed, and put it before what is asked."""

from django.db import transaction

from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import on_thread
from apps.accounts.models import User
from apps.chat.models import PersonalInstructions
from apps.inference import prompts
from apps.inference.catalog import CatalogModel
from apps.inference.prompts import ChatMessage

MAX_CHARS = 1_500


def clean(text: str) -> str:
    """Return a text as it is kept. Raises: AiscaleError (INVALID_REQUEST)."""
    words = text.replace("\r\n", "\n").strip()
    if len(words) > MAX_CHARS:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"Your instructions have {len(words):,} characters; the most is {MAX_CHARS:,}. Please shorten them.",
            param="text",
        )
    if "\x00" in words:
        raise AiscaleError(Code.INVALID_REQUEST, "Your instructions hold a NUL character. Remove it.", param="text")
    return words


def save(user: User, text: str) -> None:
    """Keep a text; an empty one is kept as none. Chats heed it from their next question on.

    I/O: SQL. Raises: AiscaleError (INVALID_REQUEST, ACCOUNT_INACTIVE).
    """
    words = clean(text)
    with transaction.atomic():
        # locked against a deletion of the account at the same moment, which would leave this behind
        if not User.objects.select_for_update(no_key=True).filter(pk=user.pk, is_active=True).first():
            message = "This account is not active. Ask the administrator of this service."
            raise AiscaleError(Code.ACCOUNT_INACTIVE, message)
        if words:
            PersonalInstructions.objects.update_or_create(user=user, defaults={"text": words})
        else:
            PersonalInstructions.objects.filter(user=user).delete()


def read(user_id: str) -> str:
    """Return a user's instructions, '' for none. ``user_id`` is public. I/O: one SQL statement."""
    found = PersonalInstructions.objects.filter(user__public_id=user_id).values_list("text", flat=True).first()
    return found or ""


class Preface:
    """Put instructions before a conversation, in the way that a model's template takes."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._as_system = True

    def add(self, history: list[ChatMessage]) -> list[ChatMessage]:
        """Return the messages for the model; ``history`` begins with a question. I/O: none."""
        if not self._text:
            return history
        if self._as_system:
            return [ChatMessage(role="system", content=self._text), *history]
        first = history[0]
        return [ChatMessage(role=first.role, content=f"{self._text}\n\n{first.content}"), *history[1:]]

    async def fit_to(self, model: CatalogModel) -> None:
        """Learn how the model wants them: some templates know no system message. I/O: as `prompts.build_prompt`."""
        if not self._text or model.upstream is not None:
            return
        try:
            await prompts.build_prompt(model, self.add([ChatMessage(role="user", content="Hello")]))
        except AiscaleError as error:
            if error.code is not Code.INVALID_REQUEST:
                raise
            self._as_system = False


async def make_preface(user_id: str, model: CatalogModel) -> Preface:
    """Return what stands before a user's conversations with a model. I/O: one SQL statement; `Preface.fit_to`."""
    preface = Preface(await on_thread(lambda: read(user_id)))
    await preface.fit_to(model)
    return preface
