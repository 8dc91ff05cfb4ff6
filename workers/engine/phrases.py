"""Score a text by the words and characters in it: TF-IDF and a logistic regression, as scikit-learn computes them.

The cutting of long texts into windows, and the reading of what is hidden in base64, hex or percent signs, follow SecureVector Guardian
(Apache-2.0), whose weights these are.
"""

import base64
import binascii
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\b\w\w+\b")
_SPACES = re.compile(r"\s\s+")
_ENDS = re.compile(r"(?<=[.!?])\s+|[\n\r]+|<!--|-->")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{16,}={0,2}")
_HEX = re.compile(r"(?:[0-9a-fA-F]{2}){8,}")
_PERCENT = re.compile(r"%[0-9A-Fa-f]{2}")

WINDOW_WORDS, STRIDE_WORDS = 24, 12
MAX_WINDOWS = 300
MAX_HIDDEN, MAX_DEPTH, MAX_HIDDEN_BYTES = 20, 3, 4096
SHORT_CHARS = 400


def iter_words(text: str, low: int, high: int) -> Iterator[str]:
    """Yield the runs of ``low`` to ``high`` words, in lower case."""
    words = _WORD.findall(text.lower())
    for size in range(low, high + 1):
        for start in range(len(words) - size + 1):
            yield " ".join(words[start : start + size])


def iter_characters(text: str, low: int, high: int) -> Iterator[str]:
    """Yield the runs of ``low`` to ``high`` characters within each word, a space on both sides."""
    for word in _SPACES.sub(" ", text.lower()).split():
        padded = f" {word} "
        for size in range(low, high + 1):
            if size >= len(padded):
                # a word shorter than the run counts once
                yield padded
                break
            for start in range(len(padded) - size + 1):
                yield padded[start : start + size]


class Phrases:
    """Hold one regression over terms. ``coefficients`` float32 ``[terms, classes]``."""

    def __init__(
        self,
        words: Sequence[str],
        word_sizes: tuple[int, int],
        characters: Sequence[str],
        character_sizes: tuple[int, int],
        idf: NDArray[np.float32],
        coefficients: NDArray[np.float32],
        intercept: NDArray[np.float32],
    ) -> None:
        self._columns = [
            {term: column for column, term in enumerate(words)},
            {term: column for column, term in enumerate(characters, len(words))},
        ]
        self._sizes = (word_sizes, character_sizes)
        self._idf, self._coefficients, self._intercept = idf, coefficients, intercept

    def score(self, text: str) -> NDArray[np.float32]:
        """Return each class's chance, float32 ``[classes]``."""
        scores = self._intercept.astype(np.float64)
        for iterate, columns, sizes in zip((iter_words, iter_characters), self._columns, self._sizes, strict=True):
            scores += self._score_block(iterate(text, *sizes), columns)
        chances = np.exp(scores - scores.max())
        shares: NDArray[np.float32] = (chances / chances.sum()).astype(np.float32)
        return shares

    def _score_block(self, terms: Iterable[str], columns: dict[str, int]) -> NDArray[np.float64]:
        counts = Counter(column for term in terms if (column := columns.get(term)) is not None)
        if not counts:
            return np.zeros(len(self._intercept))
        places = np.fromiter(counts.keys(), np.int64, len(counts))
        weights = (1.0 + np.log(np.fromiter(counts.values(), np.float64, len(counts)))) * self._idf[places]
        scores: NDArray[np.float64] = (weights / np.linalg.norm(weights)) @ self._coefficients[places]
        return scores


def list_windows(text: str) -> list[str]:
    """Return what else of a text is worth a look of its own: its sentences in overlapping pieces, and what it hides.

    A few words of attack are lost in the average of a long text, and are not in these. At most `MAX_WINDOWS` and `MAX_HIDDEN`.
    """
    hidden = list_hidden(text)
    if "\n" in text or len(text.split()) > WINDOW_WORDS:
        return [*_pieces(text), *hidden]
    return [*hidden, text[::-1]] if len(text) <= SHORT_CHARS else hidden


def _pieces(text: str) -> list[str]:
    pieces: list[str] = []
    for sentence in _ENDS.split(text):
        words = sentence.split()
        for start in range(0, len(words), STRIDE_WORDS):
            pieces.append(" ".join(words[start : start + WINDOW_WORDS]))
            if len(pieces) == MAX_WINDOWS:
                return pieces
            if start + WINDOW_WORDS >= len(words):
                break
    return pieces


def list_hidden(text: str) -> list[str]:
    """Return what base64, hex and percent signs in a text spell out, and what is hidden in that in turn."""
    found: list[str] = []
    plain = unquote(text) if _PERCENT.search(text) else text
    if plain != text and _reads(plain):
        found.append(plain)
        _unpack(plain, 0, found)
    _unpack(text, 0, found)
    return found[:MAX_HIDDEN]


def _unpack(text: str, depth: int, found: list[str]) -> None:
    for pattern, decode in ((_BASE64, _decode_base64), (_HEX, _decode_hex)):
        for match in pattern.finditer(text):
            if depth == MAX_DEPTH or len(found) >= MAX_HIDDEN:
                return
            try:
                inner = decode(match.group())[:MAX_HIDDEN_BYTES].decode()
            except (binascii.Error, ValueError):
                continue
            if _reads(inner):
                found.append(inner)
                _unpack(inner, depth + 1, found)


def _decode_base64(blob: str) -> bytes:
    return base64.b64decode(blob + "=" * (-len(blob) % 4))


def _decode_hex(blob: str) -> bytes:
    return bytes.fromhex(blob[: len(blob) // 2 * 2])


def _reads(text: str) -> bool:
    """Say whether something decoded looks like text."""
    good = sum(character.isprintable() or character.isspace() for character in text)
    return len(text) >= 6 and good > 0.85 * len(text) and any(character.isalpha() for character in text)
