"""Make a Hugging Face `tokenizer.json` from the vocabulary that a GGUF file carries."""

from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from workers.artifacts import sentencepiece_bpe
from workers.artifacts.errors import ConversionError
from workers.artifacts.gguf_file import GgufFile, first_line, open_file
from workers.artifacts.vocabulary import END_WORDS, MAX_TEMPLATE_CHARS, Vocabulary

_SPECIAL_TYPES = (int(gguf.TokenType.CONTROL), int(gguf.TokenType.USER_DEFINED))

_NORMALIZED = ("qwen2", "deepseek-r1-qwen")
_DIGITS = pre_tokenizers.Digits(individual_digits=True)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def convert_tokenizer(source: Path, target: Path) -> Vocabulary:
    """Write ``tokenizer.json`` to ``target``.

    I/O: reads the source's metadata, writes the target. Raises: ConversionError for a vocabulary of another kind.
    """
    return write(open_file(source), target)


def write(file: GgufFile, target: Path) -> Vocabulary:
    """Write the tokenizer of a file that is open. I/O: writes the target. Raises: as `convert_tokenizer`."""
    kind = file.read("tokenizer.ggml.model")
    build = {"gpt2": _build_byte_level, "llama": _build_sentencepiece}.get(kind) if isinstance(kind, str) else None
    if build is None:
        raise ConversionError(
            f"the GGUF file's tokenizer is of kind {str(kind)[:40]!r}; byte-level BPE (gpt2) and SentencePiece BPE (llama) are converted"
        )
    tokens: list[str] = file.read("tokenizer.ggml.tokens")
    try:
        types: list[int] = file.read("tokenizer.ggml.token_type", [int(gguf.TokenType.NORMAL)] * len(tokens))
        vocabulary = {token: index for index, token in enumerate(tokens)}
        if len(vocabulary) != len(tokens) or len(types) != len(tokens):
            raise ConversionError("the GGUF file lists a token twice; it is damaged")
        tokenizer = build(file, tokens, types)
        made = _vocabulary(file, tokens, vocabulary)
    except ConversionError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ConversionError(f"the GGUF file's vocabulary cannot be used: {first_line(error)}") from error
    tokenizer.save(str(target), pretty=False)
    return made


def _build_byte_level(file: GgufFile, tokens: list[str], types: list[int]) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in file.read("tokenizer.ggml.merges")]
    cut = file.read("tokenizer.ggml.pre", "default")
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(cut)
    if cut in _NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ in _SPECIAL_TYPES]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _build_sentencepiece(file: GgufFile, tokens: list[str], types: list[int]) -> Tokenizer:
    prefix_space = bool(file.read("tokenizer.ggml.add_space_prefix", True))
    return sentencepiece_bpe.build(tokens, file.read("tokenizer.ggml.scores"), types, prefix_space=prefix_space)


def _vocabulary(file: GgufFile, tokens: list[str], vocabulary: dict[str, int]) -> Vocabulary:
    eos = int(file.read("tokenizer.ggml.eos_token_id"))
    bos = int(file.read("tokenizer.ggml.bos_token_id", -1))
    template = str(file.read("tokenizer.chat_template", ""))
    if not 0 <= eos < len(tokens) or bos >= len(tokens) or len(template) > MAX_TEMPLATE_CHARS:
        raise ConversionError(
            "the GGUF file names a first or last token that does not exist, or a chat template without end"
        )
    ends = [eos, *(vocabulary[word] for word in END_WORDS if word in vocabulary)]
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
        return _cut_by(_LLAMA3)
    if name in _NORMALIZED:
        return _cut_by(_QWEN2)
    raise ConversionError(f"the GGUF file cuts text in the way {name!r}, which the converter does not know")


def _cut_by(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
