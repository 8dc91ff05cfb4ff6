"""Say what is wrong with texts: run the moderation model over them, and put its labels into OpenAI's categories."""

import struct
from functools import lru_cache
from typing import Any, Literal

import msgspec
from django.conf import settings

from aiscale.errors import AiscaleError, Code
from aiscale.wire.manifest import read_manifest
from apps.accounts.callers import Caller
from apps.inference import catalog, encodings, prompts
from apps.inference.catalog import CatalogModel

MAX_INPUTS = 1024
MAX_PIECES = 2048
BUNDLED = "moderation"
OVERLAP_PART = 8
"""Pieces of tokens overlap by one part in so many."""
OVERLAP_CHARS = 512
"""How far the pieces of a long text overlap, so that nothing is cut in two and missed."""

OPENAI_NAMES = frozenset(
    {"omni-moderation-latest", "omni-moderation-2024-09-26", "text-moderation-latest", "text-moderation-stable"}
)
"""What clients send when they name no model of ours: they mean whatever moderates here."""

CATEGORIES: dict[str, tuple[tuple[str, ...], ...]] = {
    # of OpenAI's names: each holds when one of its groups does, a group when all of its labels do
    "harassment": (("toxic",), ("severe_toxic",), ("insult",), ("obscene",)),
    "harassment/threatening": (("threat",),),
    "hate": (("identity_hate",),),
    "hate/threatening": (("identity_hate", "threat"),),
    "illicit": (("harmful_content",),),
    "illicit/violent": (("harmful_content", "threat"),),
    "self-harm": (),
    "self-harm/intent": (),
    "self-harm/instructions": (),
    "sexual": (),
    "sexual/minors": (),
    "violence": (("threat",),),
    "violence/graphic": (),
}
"""OpenAI's categories by the labels that the model knows. Those without are never flagged: nothing here looks for them."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Judge one text: by OpenAI's categories, then by the model's own labels."""

    categories: dict[str, bool]
    scores: dict[str, float]
    labels: tuple[str, ...] = ()
    """What the text is flagged for, by the model's own labels."""

    @property
    def flagged(self) -> bool:
        return any(self.categories.values())


class Labels(msgspec.Struct, frozen=True):
    """State a classifier's labels, from which score on each holds, and what texts are sent to it as."""

    names: tuple[str, ...]
    thresholds: tuple[float, ...]
    reads: Literal["tokens", "characters"] = "characters"


class ModerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Ask for a verdict on each text. ``model`` None: whatever moderates here."""

    request_id: str
    source: Literal["api", "chat"]
    texts: list[str]
    model: str | None = None


class ModerationResult(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    verdicts: list[Verdict]
    headers: dict[str, str]


async def moderate(request: ModerationRequest, caller: Caller) -> ModerationResult:
    """Judge all texts, or none.

    I/O: two Redis trips to send. Raises: AiscaleError.
    """
    model = await get_model(request.model)
    pieces, owners = await read(model, request.texts)
    rows = await encodings.encode(model, pieces, caller, request_id=request.request_id, source=request.source)
    verdicts = judge(rows, owners, len(request.texts), get_labels(model))
    return ModerationResult(model=model.slug, verdicts=verdicts, headers=rows.headers)


async def get_model(name: str | None = None) -> CatalogModel:
    """Return the named classifier, or the one that moderates here: the bundled one, else the first that knows a label of `CATEGORIES`.

    I/O: as `catalog.get_model`, and as `get_labels`. Raises: AiscaleError.
    """
    if name is not None and name not in OPENAI_NAMES:
        return await catalog.get_model(name, "classify")
    for model in sorted(await catalog.list_local("classify"), key=lambda model: (model.slug != BUNDLED, model.slug)):
        if model.slug == BUNDLED or moderates(model):
            return model
    raise AiscaleError(
        Code.MODEL_NOT_FOUND,
        "No moderation model is enabled here. Tell the administrator of this service.",
        param="model",
    )


def moderates(model: CatalogModel) -> bool:
    """Say whether a classifier looks for something that OpenAI's categories name: others tell moods or languages apart."""
    known = {name for groups in CATEGORIES.values() for group in groups for name in group} | set(CATEGORIES)
    try:
        return not known.isdisjoint(get_labels(model).names)
    except AiscaleError:
        return False


async def read(model: CatalogModel, texts: list[str]) -> tuple[list[list[int]], list[int]]:
    """Return texts as the classifier reads them, in pieces that fit it, with the index of the text of each.

    I/O: none once warm. Raises: AiscaleError (INVALID_REQUEST) for too much text.
    """
    if get_labels(model).reads == "characters":
        pieces, owners = cut(texts, model.context_tokens)
        return [list(map(ord, piece)) for piece in pieces], owners
    longest = model.context_tokens - len(prompts.wrap_token_ids(model, [0])) + 1
    inputs, owners = [], []
    for owner, text in enumerate(texts):
        ids = await prompts.encode_prompt(model, text)
        overlap = longest // OVERLAP_PART
        for start in range(0, max(len(ids) - overlap, 1), longest - overlap):
            inputs.append(prompts.wrap_token_ids(model, ids[start : start + longest]))
            owners.append(owner)
        _check_pieces(inputs, MAX_PIECES * (longest - overlap), "tokens")
    return inputs, owners


def cut(texts: list[str], longest: int) -> tuple[list[str], list[int]]:
    """Cut texts into pieces of at most ``longest`` characters that overlap; return them with the index of the text of each.

    Raises: AiscaleError (INVALID_REQUEST) for too much text.
    """
    pieces, owners = [], []
    for owner, text in enumerate(texts):
        for start in range(0, max(len(text) - OVERLAP_CHARS, 1), longest - OVERLAP_CHARS):
            pieces.append(text[start : start + longest])
            owners.append(owner)
            _check_pieces(pieces, MAX_PIECES * (longest - OVERLAP_CHARS), "characters")
    return pieces, owners


def _check_pieces(pieces: list[Any], most: int, unit: str) -> None:
    if len(pieces) > MAX_PIECES:
        raise AiscaleError(
            Code.INVALID_REQUEST, f"The input is longer than {most:,} {unit}. Send it in parts.", param="input"
        )


def judge(rows: encodings.Rows, owners: list[int], count: int, labels: Labels) -> list[Verdict]:
    """Return a verdict for each text: of the pieces of one, the highest score of each label counts."""
    highest = [[0.0] * len(labels.names) for _ in range(count)]
    for owner, row in zip(owners, struct.iter_unpack(f"<{rows.dimensions}f", rows.data), strict=True):
        highest[owner] = [max(pair) for pair in zip(highest[owner], row, strict=True)]
    return [_word(scores, labels) for scores in highest]


@lru_cache(maxsize=64)
def _read_labels(slug: str, version: str) -> Labels:
    manifest = read_manifest(settings.ENV.models_dir / slug / version)
    return Labels(manifest.labels, manifest.thresholds, manifest.reads)


def get_labels(model: CatalogModel) -> Labels:
    """Return a classifier's labels. I/O: a small file, once a version. Raises: AiscaleError (BACKEND_UNAVAILABLE)."""
    try:
        return _read_labels(model.slug, model.version)
    except (OSError, msgspec.MsgspecError) as error:
        raise AiscaleError(
            Code.BACKEND_UNAVAILABLE,
            f"The files of the model {model.slug!r} are not on this server. Tell the administrator of this service.",
        ) from error


def _word(scores: list[float], labels: Labels) -> Verdict:
    own = dict(zip(labels.names, scores, strict=True))
    holds = {name: own[name] >= threshold for name, threshold in zip(labels.names, labels.thresholds, strict=True)}
    categories, values = {}, {}
    for category, groups in CATEGORIES.items():
        categories[category] = any(all(holds.get(name, False) for name in group) for group in groups)
        values[category] = max((min(own.get(name, 0.0) for name in group) for group in groups), default=0.0)
    flagged = tuple(name for name, held in holds.items() if held)
    return Verdict(categories=categories | holds, scores=values | own, labels=flagged)
