"""Turn structs into bytes and back. Jobs travel as JSON text inside a Celery message, events as MessagePack in streams."""

from typing import TypeVar

import msgspec

from aiscale.wire.events import Control, Event
from aiscale.wire.jobs import WIRE_VERSION, EncodeJob, GenerateJob

Job = TypeVar("Job", GenerateJob, EncodeJob)

_json = msgspec.json.Encoder()
_msgpack = msgspec.msgpack.Encoder()
_generate = msgspec.json.Decoder(GenerateJob)
_encode = msgspec.json.Decoder(EncodeJob)
_event: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
_control = msgspec.msgpack.Decoder(Control)


class UnknownVersion(ValueError):
    """The message was written by a newer or older aiscale than this process can read."""


def encode_job(job: GenerateJob | EncodeJob) -> str:
    return _json.encode(job).decode()


def decode_generate_job(text: str | bytes) -> GenerateJob:
    """Raises: msgspec.DecodeError or ValidationError; UnknownVersion."""
    return _checked(_generate.decode(text))


def decode_encode_job(text: str | bytes) -> EncodeJob:
    """Raises: msgspec.DecodeError or ValidationError; UnknownVersion."""
    return _checked(_encode.decode(text))


def encode_event(event: Event) -> bytes:
    return _msgpack.encode(event)


def decode_event(data: bytes) -> Event:
    """Raises: msgspec.DecodeError or ValidationError."""
    return _event.decode(data)


def encode_control(control: Control) -> bytes:
    return _msgpack.encode(control)


def decode_control(data: bytes) -> Control:
    """Raises: msgspec.DecodeError or ValidationError."""
    return _control.decode(data)


def _checked(job: Job) -> Job:
    if job.v != WIRE_VERSION:
        raise UnknownVersion(f"the job speaks wire version {job.v}, this process {WIRE_VERSION}: deploy both sides")
    return job
