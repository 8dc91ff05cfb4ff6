"""State what a source says of its tokens beside the tokenizer itself."""

from dataclasses import dataclass

END_WORDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
MAX_TEMPLATE_CHARS = 100_000


@dataclass(frozen=True)
class Vocabulary:
    """Name the tokens that begin and end, and how a conversation is written down."""

    size: int
    bos_token: str
    eos_token: str
    eos_token_ids: tuple[int, ...]
    """Every token that ends an answer, the source's own first."""
    chat_template: str | None
