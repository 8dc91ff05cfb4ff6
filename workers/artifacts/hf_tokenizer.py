"""Take a Hugging Face folder's ``tokenizer.json``, and what its other files say of the tokens."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from workers.artifacts.errors import ConversionError
from workers.artifacts.safetensors_decoder import CONFIG_FILE, read_json
from workers.artifacts.vocabulary import END_WORDS, MAX_TEMPLATE_CHARS, Vocabulary

TOKENIZER_SOURCE = "tokenizer.json"


def convert_tokenizer(folder: Path, target: Path) -> Vocabulary:
    """Write ``tokenizer.json`` to ``target``, and say what else there is. I/O: small files. Raises: ConversionError."""
    tokenizer = copy_tokenizer(folder, target)
    said = _read_optional(folder / "tokenizer_config.json")
    bos, eos = _word(said.get("bos_token")), _word(said.get("eos_token"))
    ends = _list_ends(folder, tokenizer, eos)
    return Vocabulary(
        size=tokenizer.get_vocab_size(),
        bos_token=bos,
        eos_token=eos or (tokenizer.id_to_token(ends[0]) or ""),
        eos_token_ids=ends,
        chat_template=_read_template(folder, said),
    )


def copy_tokenizer(folder: Path, target: Path) -> Tokenizer:
    """Write ``tokenizer.json`` to ``target``, without padding and truncation. I/O: two files. Raises: ConversionError."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_SOURCE))
    except Exception as error:  # the library raises nothing narrower
        raise ConversionError(f"{TOKENIZER_SOURCE} cannot be read: {str(error)[:150]}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(target), pretty=False)
    return tokenizer


def _list_ends(folder: Path, tokenizer: Tokenizer, eos: str) -> tuple[int, ...]:
    said: list[Any] = []
    for config in (_read_optional(folder / "generation_config.json"), _read_optional(folder / CONFIG_FILE)):
        value = config.get("eos_token_id")
        said += value if isinstance(value, list) else [value]
    said += [tokenizer.token_to_id(word) for word in (eos, *END_WORDS) if word]
    ends = [token for token in said if type(token) is int and 0 <= token < tokenizer.get_vocab_size()]
    if not ends:
        raise ConversionError("the folder does not say which token ends an answer (eos_token_id)")
    return tuple(dict.fromkeys(ends))


def _read_template(folder: Path, said: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    found: Any = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else said.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if isinstance(found, str) and len(found) > MAX_TEMPLATE_CHARS:
        raise ConversionError(f"the chat template has {len(found)} characters; at most {MAX_TEMPLATE_CHARS} are taken")
    return found if isinstance(found, str) and found else None


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _word(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
