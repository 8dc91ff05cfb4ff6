"""Say what browser and server tell each other over the WebSocket: JSON objects, told apart by ``type``."""

from typing import Any

import msgspec

from aiscale.errors import AiscaleError, Code

MAX_FRAME_BYTES = 64 << 10


class Send(msgspec.Struct, frozen=True, kw_only=True, tag="send", tag_field="type", forbid_unknown_fields=True):
    """Say something, in a conversation or (None) in a new one. ``client_id`` makes sending it twice harmless.

    ``organization_id`` is that of the page, for a new conversation: another tab may have switched to another since. A conversation
    is paid by the organization that it was begun in. ``replaces`` names an earlier question of the conversation: this one, and its answer,
    stand in its place and in that of all that followed.
    """

    text: str
    model: str
    client_id: str
    conversation_id: str | None = None
    organization_id: str | None = None
    replaces: str | None = None


class Retry(msgspec.Struct, frozen=True, kw_only=True, tag="retry", tag_field="type", forbid_unknown_fields=True):
    """Ask again for the last answer of a conversation. ``client_id``: as with `Send`."""

    message_id: str
    model: str
    client_id: str


class Show(msgspec.Struct, frozen=True, kw_only=True, tag="show", tag_field="type", forbid_unknown_fields=True):
    """Make another version of a message part of the talk, with what followed it."""

    message_id: str


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop", tag_field="type", forbid_unknown_fields=True):
    """Stop an answer."""

    message_id: str


class Resume(msgspec.Struct, frozen=True, kw_only=True, tag="resume", tag_field="type", forbid_unknown_fields=True):
    """Tell an answer from its start, and go on with it."""

    message_id: str


class Watch(msgspec.Struct, frozen=True, kw_only=True, tag="watch", tag_field="type", forbid_unknown_fields=True):
    """Say what the page shows: a conversation up to its message ``last_id``, or (None) none yet. It is told when there is more, now and
    from now on."""

    conversation_id: str | None = None
    last_id: str | None = None


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping", tag_field="type", forbid_unknown_fields=True):
    """Ask whether the connection lives."""


ClientFrame = Send | Retry | Show | Stop | Resume | Watch | Ping
_decoder = msgspec.json.Decoder(ClientFrame)
_encoder = msgspec.json.Encoder()


def read_frame(text: str) -> ClientFrame:
    """Decode a browser's frame. Raises: AiscaleError (INVALID_JSON, INVALID_REQUEST)."""
    try:
        frame: ClientFrame = _decoder.decode(text)
    except msgspec.ValidationError as error:
        raise AiscaleError(Code.INVALID_REQUEST, f"This frame is not understood: {error}.") from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise AiscaleError(Code.INVALID_JSON, "A frame must be a JSON object.") from error
    names = ("client_id", "conversation_id", "organization_id", "message_id", "replaces", "last_id")
    ids = [getattr(frame, name, None) or "" for name in names]
    if any("\x00" in each for each in ids):
        raise AiscaleError(Code.INVALID_REQUEST, "An id holds a NUL character. Send the ids that the server gave you.")
    if isinstance(frame, Send | Retry) and not 1 <= len(frame.client_id) <= 64:
        raise AiscaleError(Code.INVALID_REQUEST, "client_id must be 1 to 64 characters.", param="client_id")
    return frame


def write_frame(kind: str, **values: Any) -> str:
    return _encoder.encode({"type": kind, **values}).decode()


def write_error(error: AiscaleError, **values: Any) -> str:
    """Tell a refusal: code, sentence, what it is about, and when to try again."""
    return write_frame(
        "error",
        code=error.code.value,
        message=error.message,
        param=error.param,
        retry_after_s=error.retry_after_s,
        **values,
    )
