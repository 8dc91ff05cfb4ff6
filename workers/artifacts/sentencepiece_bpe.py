"""Rebuild a SentencePiece BPE tokenizer (llama 2, mistral, TinyLlama) from the pieces and scores that a GGUF file carries."""

from collections.abc import Sequence

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from workers.artifacts.errors import ConversionError

_SPACE = "\u2581"
_LONGEST_PIECE = 64
"""Merges are made of pieces; longer ones are words that their owner added, and would cost their square."""


def build(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], *, prefix_space: bool) -> Tokenizer:
    """Return the tokenizer. Raises: ConversionError when pieces for bytes are missing, or the lists do not belong together."""
    if not len(tokens) == len(scores) == len(types):
        raise ConversionError("the GGUF file has another number of scores than of tokens; it is damaged")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    of_type = {
        kind: [t for t, type_ in zip(tokens, types, strict=True) if type_ == int(kind)] for kind in gguf.TokenType
    }
    if len(of_type[gguf.TokenType.BYTE]) != 256 or len(of_type[gguf.TokenType.UNKNOWN]) != 1:
        raise ConversionError(
            "the GGUF file's tokenizer has no pieces for bytes; only SentencePiece BPE with them is converted"
        )
    [unknown] = of_type[gguf.TokenType.UNKNOWN]
    merges = _list_merges(of_type[gguf.TokenType.NORMAL], scores, vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend(_SPACE)] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    shown = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*shown, *([decoders.Strip(" ", 1, 0)] if prefix_space else [])])
    control = [unknown, *of_type[gguf.TokenType.CONTROL]]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in of_type[gguf.TokenType.USER_DEFINED]])
    return tokenizer


def _list_merges(pieces: list[str], scores: Sequence[float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """List each way to put a piece together from two others; the piece with the best score is put together first."""
    normal = set(pieces)
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece in pieces:
        for at in range(1, len(piece) if len(piece) <= _LONGEST_PIECE else 0):
            left, right = piece[:at], piece[at:]
            if left in normal and right in normal:
                found.append((-scores[vocabulary[piece]], vocabulary[left], vocabulary[right], (left, right)))
    found.sort(key=lambda entry: entry[:3])
    return [pair for _, _, _, pair in found]
