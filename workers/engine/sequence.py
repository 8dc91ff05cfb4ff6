"""Hold one request while the engine works on it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from workers.engine.detokenizer import Detokenizer

EndReason = Literal["stop", "length", "cancelled", "killed", "deadline", "error"]


@dataclass(frozen=True, kw_only=True)
class Params:
    """Say how tokens are chosen and when to end."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Output:
    """Say what one step made of a sequence. ``end`` is set once, on its last."""

    text: str
    prompt_tokens: int
    """Prompt tokens computed so far."""
    completion_tokens: int
    end: EndReason | None = None
    error: str | None = None


@dataclass(kw_only=True, eq=False)
class Sequence:
    """Be one request: its tokens, its slot and its end. Only the engine's thread changes it once submitted."""

    job_id: str
    prompt: list[int]
    params: Params
    priority: int
    deadline_s: float
    """Wall clock, epoch seconds."""
    detokenizer: Detokenizer
    on_output: Callable[[Output], None]
    """Called on the engine's thread after each step that made something; must not block."""
    arrived_s: float = field(default_factory=time.monotonic)
    slot: int = -1
    prefilled: int = 0
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    abort_reason: EndReason | None = None
    abort_message: str | None = None
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.params.seed)

    @property
    def is_prefilled(self) -> bool:
        return self.prefilled == len(self.prompt)

    @property
    def position(self) -> int:
        """Where the last token made goes: the number of tokens whose keys and values are in the cache."""
        return len(self.prompt) + len(self.tokens) - 1
