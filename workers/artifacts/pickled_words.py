"""Read the vocabulary of a pickled Keras tokenizer without unpickling it.

A pickle is a program. This reads its instructions one by one and carries out those that build dictionaries, tuples, texts and numbers;
classes become inert boxes with a name, nothing is imported and nothing is called. Any other instruction or class ends the reading.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.artifacts.errors import ConversionError

_CLASSES = frozenset(
    {
        "tox_block.data_processing.preprocessors TokenSequencer",
        "keras_preprocessing.text Tokenizer",
        "collections OrderedDict",
        "collections defaultdict",
        "builtins int",
    }
)
_MOST_INSTRUCTIONS = 10_000_000
_MARK = object()


@dataclass
class _Box:
    """Stand for an object of a class: its state and its items, and none of its behaviour."""

    name: str
    state: dict[str, Any] = field(default_factory=dict)
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Words:
    """State a Keras tokenizer: ``words[i]`` has the number ``i + 1``; each character of ``separators`` counts as a space."""

    words: list[str]
    separators: str
    longest: int
    """The most tokens of a sequence."""


def read_words(path: Path) -> Words:
    """Return the words that have numbers. I/O: reads the file; some seconds. Raises: ConversionError for anything unexpected."""
    try:
        sequencer = _Reader().read(path.read_bytes())
        state = sequencer.state["tokenizer"].state
        numbers: dict[str, int] = state["word_index"]
        most = int(state["num_words"])
        if state["lower"] is not True or state["split"] != " " or state["char_level"] or state["oov_token"]:
            raise ConversionError(f"{path.name} holds a tokenizer that cuts text in another way than expected")
        known = sorted((number, word) for word, number in numbers.items() if number < most)
        if [number for number, _ in known] != list(range(1, len(known) + 1)):
            raise ConversionError(f"the words of {path.name} are not numbered from 1 without a gap")
        return Words([word for _, word in known], str(state["filters"]), int(sequencer.state["max_sequence_length"]))
    except (KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise ConversionError(f"{path.name} holds no Keras tokenizer: {error!r}") from error


class _Reader:
    """Carry out the allowed instructions of one pickle."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._do: dict[str, Callable[[Any], None]] = {
            "PROTO": lambda _: None,
            "MARK": lambda _: self._stack.append(_MARK),
            "NONE": lambda _: self._stack.append(None),
            "NEWTRUE": lambda _: self._stack.append(True),
            "NEWFALSE": lambda _: self._stack.append(False),
            "EMPTY_DICT": lambda _: self._stack.append({}),
            "EMPTY_TUPLE": lambda _: self._stack.append(()),
            "TUPLE1": lambda _: self._stack.append((self._stack.pop(),)),
            "GLOBAL": self._name_class,
            "NEWOBJ": self._box,
            "REDUCE": self._box,
            "BUILD": self._set_state,
            "SETITEMS": self._set_items,
        }
        for name in ("BINUNICODE", "BININT", "BININT1", "BININT2"):
            self._do[name] = self._stack.append
        for name in ("BINPUT", "LONG_BINPUT"):
            self._do[name] = lambda place: self._memo.__setitem__(place, self._stack[-1])
        for name in ("BINGET", "LONG_BINGET"):
            self._do[name] = lambda place: self._stack.append(self._memo[place])

    def read(self, data: bytes) -> Any:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
            if instruction.name == "STOP":
                return self._stack.pop()
            carry_out = self._do.get(instruction.name)
            if carry_out is None or count > _MOST_INSTRUCTIONS:
                raise ConversionError(f"the pickle wants to {instruction.name}, which is not done here")
            carry_out(argument)
        raise ConversionError("the pickle has no end")

    def _name_class(self, name: str) -> None:
        if name not in _CLASSES:
            raise ConversionError(f"the pickle names {name}, which does not belong in it")
        self._stack.append(_Box(name))

    def _box(self, _: Any) -> None:
        """Take (class, arguments) and leave an empty box of the class: it is not called."""
        self._stack.pop()
        self._stack.append(_Box(self._stack.pop().name))

    def _set_state(self, _: Any) -> None:
        state = self._stack.pop()
        self._stack[-1].state = state

    def _set_items(self, _: Any) -> None:
        start = len(self._stack) - 1
        while self._stack[start] is not _MARK:
            start -= 1
        values = self._stack[start + 1 :]
        del self._stack[start:]
        target = self._stack[-1]
        (target.items if isinstance(target, _Box) else target).update(zip(values[::2], values[1::2], strict=True))
