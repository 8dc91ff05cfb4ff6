"""Hold one request while the engine works on it."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from workers.engine.detokenizer import Detokenizer
from workers.engine.speculation import Guesser

EndReason = Literal["stop", "length", "cancelled", "killed", "deadline", "error"]


@dataclass(frozen=True, kw_only=True)
class Params:
    """Say how tokens are chosen and when to end. See `aiscale.wire.jobs.Sampling`."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    """Token ids, and what is added to their logits."""
    seed: int | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Logprob:
    """Tell how likely the model found a token, and which it found likeliest: natural logarithms."""

    token_id: int
    value: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Output:
    """Say what one step made of a sequence. ``end`` is set once, on its last."""

    text: str
    prompt_tokens: int
    """Prompt tokens that are in the cache by now, computed or found there."""
    completion_tokens: int
    cached_tokens: int = 0
    """Those of the prompt tokens that were found."""
    logprobs: tuple[Logprob, ...] = ()
    end: EndReason | None = None
    error: str | None = None


class Matcher(Protocol):
    """Follow a grammar, token by token."""

    def list_forbidden(self) -> NDArray[np.bool_]:
        """Return bool ``[vocab]``: which tokens may not come next."""
        ...

    def take(self, token_id: int) -> bool:
        """Go on by one token. False when the grammar does not allow it."""
        ...


class TokenCounts:
    """Count tokens as they come, ready for arithmetic on the logits."""

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        self._places: dict[int, int] = {}
        self._ids = np.zeros(64, np.int64)
        self._counts = np.zeros(64, np.float32)
        for token_id in token_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token_id
        self._counts[place] += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: len(self._places)]


@dataclass(kw_only=True, eq=False)
class Sequence:
    """Be one choice of a request: its tokens, its slot and its end. Only the engine's thread changes it once submitted."""

    job_id: str
    prompt: list[int]
    params: Params
    priority: int
    deadline_s: float
    """Wall clock, epoch seconds."""
    detokenizer: Detokenizer
    on_output: Callable[[Output], None]
    """Called on the engine's thread after each step that made something; must not block."""
    rng: np.random.Generator = field(default_factory=np.random.default_rng)
    matcher: Matcher | None = None
    forks: list["Sequence"] = field(default_factory=list)
    """The request's other choices: they start from this one's prompt, in the same step."""
    is_fork: bool = False
    prefix_scope: str = ""
    """Whose kept beginnings of prompts this one may use and adds to; '' for none."""
    arrived_s: float = field(default_factory=time.monotonic)
    told_s: float = 0.0
    """When its last token came."""
    slot: int = -1
    reserved_tokens: int = 0
    prefilled: int = 0
    cached: int = 0
    """Prompt tokens whose keys and values were there already."""
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    abort_reason: EndReason | None = None
    abort_message: str | None = None
    made: TokenCounts = field(default_factory=TokenCounts)
    seen: TokenCounts = field(init=False)
    changes_logits: bool = field(init=False)
    """Penalties, bias or a grammar change this sequence's logits."""
    unshown: list[tuple[int, Logprob]] = field(default_factory=list)
    """Logprobs whose text is held back, each with the place in the text where it begins."""
    guesser: Guesser | None = None
    """Set once its tokens are guessed."""

    def __post_init__(self) -> None:
        params = self.params
        self._counts_made = bool(params.presence_penalty or params.frequency_penalty)
        self._counts_seen = params.repetition_penalty != 1.0
        self.seen = TokenCounts(self.prompt if self._counts_seen else ())
        biased = params.bias is not None or self.matcher is not None
        self.changes_logits = self._counts_made or self._counts_seen or biased

    def add_forks(self, forks: Iterable["Sequence"]) -> None:
        """Make others of the same job and prompt start with this one."""
        for fork in forks:
            fork.is_fork = True
            self.forks.append(fork)

    def append(self, token_id: int) -> None:
        """Take the token that was chosen."""
        self.tokens.append(token_id)
        if self.guesser is not None:
            self.guesser.add(token_id)
        if self._counts_made:
            self.made.add(token_id)
        if self._counts_seen:
            self.seen.add(token_id)

    @property
    def is_plain(self) -> bool:
        """Say whether its next token is the likeliest, and nothing more is asked of the logits."""
        return self.params.temperature <= 0 and not self.changes_logits and self.params.top_logprobs is None

    @property
    def is_prefilled(self) -> bool:
        return self.prefilled == len(self.prompt)

    @property
    def position(self) -> int:
        """Where the last token made goes: the number of tokens whose keys and values are in the cache."""
        return len(self.prompt) + len(self.tokens) - 1
