"""Know the bytes of each token, apart from its neighbours."""

import re
from functools import cached_property

from tokenizers import Tokenizer

from workers.engine.grammar import Grammars

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Return the letters by which byte-level BPE writes bytes, as GPT-2 chose them."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    return letters | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


class Vocabulary:
    """Look tokens of one tokenizer up."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int = 0, eos_token_ids: tuple[int, ...] = ()) -> None:
        self.tokenizer = tokenizer
        self._vocab_size, self._eos_token_ids = vocab_size, eos_token_ids

    @cached_property
    def grammars(self) -> Grammars:
        """Made at the first request that asks for a grammar."""
        return Grammars(self.tokenizer, self._vocab_size or self.tokenizer.get_vocab_size(), self._eos_token_ids)

    @cached_property
    def _added(self) -> dict[int, str]:
        return {token_id: token.content for token_id, token in self.tokenizer.get_added_tokens_decoder().items()}

    def bytes_of(self, token_id: int) -> bytes:
        """Return a token's bytes; control tokens are written out, unknown ids are empty."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self.tokenizer.id_to_token(token_id) or ""
        if all(letter in _ALPHABET for letter in piece):
            return bytes(_ALPHABET[letter] for letter in piece)
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode()
