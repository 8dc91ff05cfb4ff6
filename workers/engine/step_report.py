"""Tell what the engine did in a step, for metrics."""

from dataclasses import dataclass, field


@dataclass
class StepReport:
    """Tell what one step did."""

    seconds: float = 0.0
    running: int = 0
    waiting: int = 0
    prefilled: int = 0
    """Prompt tokens computed."""
    decoded: int = 0
    """Sequences that got a token by decoding."""
    guessed: int = 0
    """Tokens that were guessed, and computed."""
    guessed_right: int = 0
    """Those of them that came."""
    reused: int = 0
    """Prompt tokens that were found in the prefix cache."""
    asked: int = 0
    """Prompt tokens of the requests that began."""
    kv_tokens: int = 0
    """Tokens that the running may come to hold."""
    kept_tokens: int = 0
    """Tokens in the prefix cache."""
    first_tokens_s: list[float] = field(default_factory=list)
    """Arrival to first token, of those that got theirs."""
    gaps_s: list[float] = field(default_factory=list)
    """Token to token, of those that got another."""
