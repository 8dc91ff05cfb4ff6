"""Make a Hugging Face `tokenizer.json` from the vocabulary that a GGUF file carries."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from workers.artifacts.errors import ConversionError

_SPECIAL_TYPES = (int(gguf.TokenType.CONTROL), int(gguf.TokenType.USER_DEFINED))
_END_WORDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")

_DIGITS = pre_tokenizers.Digits(individual_digits=True)
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Vocabulary:
    """State what else the GGUF file says of its tokens."""

    size: int
    bos_token: str
    eos_token: str
    eos_token_ids: tuple[int, ...]
    """Every token that ends an answer, the file's own first."""
    chat_template: str | None


def convert_tokenizer(source: Path, target: Path) -> Vocabulary:
    """Write ``tokenizer.json`` to ``target``.

    I/O: reads the source's metadata, writes the target. Raises: ConversionError for a vocabulary that is no byte-level BPE.
    """
    fields = gguf.GGUFReader(str(source)).fields
    kind = _read(fields, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise ConversionError(f"the GGUF file's tokenizer is of kind {kind!r}; only byte-level BPE (gpt2) is converted")
    tokens: list[str] = _read(fields, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _read(fields, "tokenizer.ggml.merges")]
    types: list[int] = _read(fields, "tokenizer.ggml.token_type", [int(gguf.TokenType.NORMAL)] * len(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ConversionError("the GGUF file lists a token twice; it is damaged")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(_read(fields, "tokenizer.ggml.pre", "default"))
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ in _SPECIAL_TYPES]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(target), pretty=False)
    return _vocabulary(fields, tokens, vocabulary)


def _vocabulary(fields: Any, tokens: list[str], vocabulary: dict[str, int]) -> Vocabulary:
    eos = int(_read(fields, "tokenizer.ggml.eos_token_id"))
    bos = int(_read(fields, "tokenizer.ggml.bos_token_id", -1))
    ends = [eos, *(vocabulary[word] for word in _END_WORDS if word in vocabulary)]
    template = _read(fields, "tokenizer.chat_template", "")
    return Vocabulary(
        size=len(tokens),
        bos_token=tokens[bos] if bos >= 0 else "",
        eos_token=tokens[eos],
        eos_token_ids=tuple(dict.fromkeys(ends)),
        chat_template=template or None,
    )


def _pre_tokenizer(name: str) -> Any:
    """Return how text is cut before BPE, by the name that llama.cpp gives it."""
    if name in ("smollm", "codeshell", "command-r", "refact", "starcoder"):
        return pre_tokenizers.Sequence([_DIGITS, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    if name in ("default", "gpt-2"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("llama-bpe", "llama3", "llama-v3"):
        split = pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ConversionError(f"the GGUF file cuts text in the way {name!r}, which the converter does not know")


def _read(fields: Any, name: str, default: Any = None) -> Any:
    field = fields.get(name)
    if field is not None:
        return field.contents()
    if default is None:
        raise ConversionError(f"the GGUF file has no {name}; it is damaged or of another kind")
    return default
