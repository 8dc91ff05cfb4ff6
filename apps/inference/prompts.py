"""Turn messages and texts into token ids, exactly as the model was trained to read them.

Text of users never becomes a control token: who writes ``<|im_end|>`` in a message sends those ten characters, and ends nothing.
"""

import asyncio
import hashlib
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.sandbox
import msgspec
from django.conf import settings
from tokenizers import Tokenizer

from aiscale.errors import AiscaleError, Code
from aiscale.wire.manifest import TOKENIZER_FILE, Manifest, read_manifest
from apps.inference.catalog import CatalogModel
from apps.inference.tools import Style, ToolCall, Tools, find_style, read_arguments

THREAD_FROM_CHARS = 2_000
"""Shorter texts are tokenized on the event loop: that takes less than a millisecond, less than going to a thread."""

MAX_REMEMBERED, MAX_REMEMBERED_CHARS = 8_192, 512
"""So many short texts' tokens are remembered: at the most some 20 MB."""

MARK_END = "\ue001"


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """Hold one turn. ``role`` is system, user, assistant, or tool for what a call gave (``tool_call_id``)."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


class TemplateError(ValueError):
    """The template refuses these messages, in its own words."""


@dataclass(frozen=True, eq=False)
class Reader:
    """Hold what reads one model's texts. ``plain`` takes control tokens as text, ``control`` as what they are."""

    manifest: Manifest
    control: Tokenizer
    plain: Tokenizer
    template: jinja2.Template | None
    specials: tuple[str, ...]
    added: dict[str, int]

    @property
    def style(self) -> Style | None:
        """How the model calls tools, if its template tells it of them."""
        return find_style(self.manifest.chat_template or "")

    @property
    def supports_tools(self) -> bool:
        return self.style is not None

    def find_token(self, mark: str) -> int | None:
        """Return the number of a mark that was added to the vocabulary as one token, control token or not; None for plain text."""
        return self.added.get(mark)

    def has_words_of(self, other: "Reader") -> bool:
        """Say whether both have the same tokenizer: token ids of one mean the same to the other."""
        return self.manifest.files[TOKENIZER_FILE] == other.manifest.files[TOKENIZER_FILE]


async def build_prompt(model: CatalogModel, messages: list[ChatMessage], tools: Tools | None = None) -> list[int]:
    """Return the token ids of a conversation, up to where the assistant speaks.

    I/O: none, once the model's tokenizer is loaded. Raises: AiscaleError (INVALID_REQUEST when the model's template refuses the messages,
    UNSUPPORTED_PARAMETER when it knows of no tools, BACKEND_UNAVAILABLE when the model's files are missing).
    """
    reader = get_reader(model)
    if not reader.supports_tools:
        _refuse_tools(model, messages, tools)
    try:
        if tools is None and sum(len(message.content) for message in messages) < THREAD_FROM_CHARS:
            return encode_messages(reader, messages)
        return await asyncio.to_thread(encode_messages, reader, messages, tools)
    except TemplateError as error:
        raise AiscaleError(
            Code.INVALID_REQUEST, f"The model cannot take these messages: {error}", param="messages"
        ) from error


def _refuse_tools(model: CatalogModel, messages: list[ChatMessage], tools: Tools | None) -> None:
    """Raise: AiscaleError (UNSUPPORTED_PARAMETER) where there are tools, or calls of them."""
    called = any(message.role == "tool" or message.tool_calls for message in messages)
    if tools is None and not called:
        return
    raise AiscaleError(
        Code.UNSUPPORTED_PARAMETER,
        f"The model {model.slug!r} was not made to call tools. Leave them out, or choose a model whose supports_tools "
        "is true under /v1/models.",
        param="messages" if tools is None else "tools",
    )


def find_template_problem(slug: str, version: str) -> str | None:
    """Say why a model cannot take chats, if so: its files may come from anywhere. I/O: its files."""
    try:
        reader = _load(slug, version)
        encode_messages(reader, [ChatMessage(role="user", content="Hello")])
    except TemplateError as error:
        return str(error)[:300]
    return None


async def encode_prompt(model: CatalogModel, prompt: str | list[int]) -> list[int]:
    """Return the token ids of a text that is to be gone on from, or check those that came as such.

    I/O and Raises: as `build_prompt`; AiscaleError for an id outside the vocabulary.
    """
    reader = get_reader(model)
    if isinstance(prompt, list):
        _check_vocabulary(model, reader, prompt, "prompt")
        return prompt
    if len(prompt) < THREAD_FROM_CHARS:
        return _encode_text(reader, prompt)
    return await asyncio.to_thread(_encode_text, reader, prompt)


async def decode(model: CatalogModel, token_ids: list[int]) -> str:
    """Return the text of token ids. I/O and Raises: as `build_prompt`."""
    reader = get_reader(model)
    return str(await asyncio.to_thread(reader.control.decode, token_ids, skip_special_tokens=False))


async def encode_texts(model: CatalogModel, texts: list[str]) -> list[list[int]]:
    """Return each text's token ids, special tokens included. I/O and Raises: as `build_prompt`."""
    reader = get_reader(model)
    if sum(map(len, texts)) < THREAD_FROM_CHARS:
        return _encode_texts(reader, texts)
    return await asyncio.to_thread(_encode_texts, reader, texts)


def wrap_token_ids(model: CatalogModel, token_ids: list[int]) -> list[int]:
    """Put the model's special tokens around a text that came as token ids. Raises: AiscaleError for an id outside the vocabulary."""
    reader = get_reader(model)
    if token_ids:
        _check_vocabulary(model, reader, token_ids, "input")
    around = reader.plain.encode("").ids
    return [*around[: len(around) // 2], *token_ids, *around[len(around) // 2 :]]


def get_reader(model: CatalogModel) -> Reader:
    """Return what reads a model's texts. I/O: the tokenizer's file, at the first call. Raises: AiscaleError."""
    try:
        return _load(model.slug, model.version)
    except (OSError, msgspec.MsgspecError) as error:
        raise AiscaleError(
            Code.BACKEND_UNAVAILABLE,
            f"The files of the model {model.slug!r} are not on this server. Tell the administrator of this service.",
        ) from error


@lru_cache(maxsize=16)
def _load(slug: str, version: str) -> Reader:
    directory = settings.ENV.models_dir / slug / version
    manifest = read_manifest(directory)
    path = str(directory / TOKENIZER_FILE)
    control, plain = Tokenizer.from_file(path), Tokenizer.from_file(path)
    for tokenizer in (control, plain):
        tokenizer.no_padding()
        tokenizer.no_truncation()
    plain.encode_special_tokens = True
    added = control.get_added_tokens_decoder()
    specials = tuple(token.content for token in added.values() if token.special)
    template = _compile(manifest.chat_template) if manifest.chat_template else None
    return Reader(
        manifest=manifest,
        control=control,
        plain=plain,
        template=template,
        specials=specials,
        added={token.content: number for number, token in added.items()},
    )


def _compile(source: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _write_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now(UTC).strftime(pattern)
    return environment.from_string(source)


def _write_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """Write JSON as models were trained to read it: jinja2's own filter escapes it for HTML and sorts it."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def encode_messages(reader: Reader, messages: list[ChatMessage], tools: Tools | None = None) -> list[int]:
    """Fill the template and tokenize it. Raises: TemplateError."""
    if reader.template is None:
        raise TemplateError("it has no chat template")
    name_call = _shorten if reader.style in (Style.MISTRAL, Style.MISTRAL_NAMED) else str
    turns = [_make_turn(message, name_call) for message in messages]
    described = None if tools is None else [tool.describe() for tool in tools.tools]
    written = (*(turn["content"] for turn in turns), json.dumps([turns, described], ensure_ascii=False))
    if not any(special in text for special in reader.specials for text in written):
        return list(reader.control.encode(_render(reader, turns, described), add_special_tokens=False).ids)
    # somebody wrote a control token: the template is filled with marks, and what they stand for is tokenized apart
    marks = Marks(reader.specials)
    turns = [
        {name: marks.hide(value) if name == "content" else marks.hide_specials(value) for name, value in turn.items()}
        for turn in turns
    ]
    rendered = _render(reader, turns, marks.hide_specials(described))
    ids: list[int] = []
    first, *rest = rendered.split(marks.mark)
    ids += reader.control.encode(first, add_special_tokens=False).ids
    for piece in rest:
        index, _, after = piece.partition(MARK_END)
        ids += reader.plain.encode(marks.texts[int(index)], add_special_tokens=False).ids
        ids += reader.control.encode(after, add_special_tokens=False).ids
    return ids


class Marks:
    """Put marks in the place of texts that hold control tokens."""

    def __init__(self, specials: tuple[str, ...]) -> None:
        self.mark = f"\ue000{secrets.token_hex(8)}:"
        self.texts: list[str] = []
        """What each mark stands for."""
        longest_first = sorted(specials, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, longest_first)))

    def hide(self, text: str) -> str:
        self.texts.append(text)
        return f"{self.mark}{len(self.texts) - 1}{MARK_END}"

    def hide_specials(self, value: Any) -> Any:
        """Hide the control tokens in each string of a value as JSON knows them."""
        if isinstance(value, str):
            return self._specials.sub(lambda found: self.hide(found.group()), value)
        if isinstance(value, list):
            return [self.hide_specials(entry) for entry in value]
        if isinstance(value, dict):
            return {self.hide_specials(name): self.hide_specials(entry) for name, entry in value.items()}
        return value


def _shorten(call_id: str) -> str:
    """Return a call's name as Mistral's templates demand it: nine letters and digits. Equal names stay equal."""
    if re.fullmatch(r"[a-zA-Z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _make_turn(message: ChatMessage, name_call: Callable[[str], str]) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": name_call(call.id),
                "type": "function",
                "function": {"name": call.name, "arguments": read_arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        turn["tool_call_id"] = name_call(message.tool_call_id)
    return turn


def _render(reader: Reader, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    assert reader.template is not None
    values: dict[str, Any] = {
        "messages": turns,
        "tools": tools,
        "add_generation_prompt": True,
        "bos_token": reader.manifest.bos_token,
        "eos_token": reader.manifest.eos_token,
    }
    try:
        return reader.template.render(values)
    except jinja2.TemplateError as error:
        raise TemplateError(str(error)) from error


def _encode_texts(reader: Reader, texts: list[str]) -> list[list[int]]:
    if len(texts) == 1:
        # a batch wakes threads, which costs ten times what a short text does
        text = texts[0]
        ids = _encode_short(reader, text) if len(text) <= MAX_REMEMBERED_CHARS else reader.plain.encode(text).ids
        return [list(ids)]
    return [encoding.ids for encoding in reader.plain.encode_batch(texts)]


@lru_cache(maxsize=MAX_REMEMBERED)
def _encode_short(reader: Reader, text: str) -> tuple[int, ...]:
    """Remember the texts that are asked for again and again."""
    return tuple(reader.plain.encode(text).ids)


def _encode_text(reader: Reader, text: str) -> list[int]:
    return list(reader.plain.encode(text, add_special_tokens=False).ids)


def _check_vocabulary(model: CatalogModel, reader: Reader, token_ids: list[int], param: str) -> None:
    if min(token_ids) < 0 or max(token_ids) >= reader.manifest.vocab_size:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"A token id lies outside the vocabulary of {model.slug}: 0 to {reader.manifest.vocab_size - 1}.",
            param=param,
        )
