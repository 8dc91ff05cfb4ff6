"""Keep an answer within a grammar: which tokens may come next, by llguidance."""

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

LIMITS = {"initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "max_lexer_states": 50_000}
"""What a grammar may cost, in llguidance's own units: it then ends its request, by name, and nobody else waits for it."""


class Grammars:
    """Make matchers for one tokenizer. May be used from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """About half a second of CPU."""
        self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=list(eos_token_ids))
        self._vocab_size = vocab_size

    def make_matcher(self, kind: str, source: str) -> "GrammarMatcher":
        """Compile a JSON schema (``json_schema``) or a Lark grammar (``lark``). Raises: ValueError for what cannot be followed."""
        make = LLMatcher.grammar_from_json_schema if kind == "json_schema" else LLMatcher.grammar_from_lark
        matcher = LLMatcher(self._tokenizer, make(source), log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise ValueError(f"the grammar cannot be followed: {matcher.get_error()[:300]}")
        return GrammarMatcher(matcher, self._vocab_size)


class GrammarMatcher:
    """Implement `workers.engine.sequence.Matcher`. One sequence's own."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def list_forbidden(self) -> NDArray[np.bool_]:
        """Raises: ValueError when the grammar turned out too costly."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error()[:300])
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        return np.equal(allowed, 0)

    def take(self, token_id: int) -> bool:
        return bool(self._matcher.consume_token(token_id))
