"""Read calls as Llama and Mistral write them: JSON that is an answer by itself, or that follows one mark."""

import re

from aiscale.wire.events import ToolCallPart
from apps.inference.call_readers import BEGINNING, ObjectEnd, join_parts, read_call
from apps.inference.tools import Style, Tools, make_call_id

[_TAG] = Style.LLAMA.value
[_MARK] = Style.MISTRAL.value
_FIRST_KEY = re.compile(r'\{\s*"((?:[^"\\]|\\.)*)"')
_CALL_KEYS = frozenset({"name", "type", "function", "id", "arguments", "parameters"})
_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:')
_NO_OBJECT = re.compile(r'\{\s*[^"\s}]')
_NAMED = re.compile(r"\s*([a-zA-Z0-9_-]{1,64})(?:\[CALL_ID\][a-zA-Z0-9]*)?(?:\[ARGS\])?\s*(?=\{)")
_LONGEST_NAME = 160
"""Characters within which a name and its marks are followed by an object, or it is no call."""
_BLANK, _BETWEEN = re.compile(r"\s*"), re.compile(r"[\s;,]*")


class CallObject:
    """Read one JSON object that may be a call, from its first brace on."""

    def __init__(self, names: set[str], index: int, are_bound: bool) -> None:
        """``are_bound``: one that is written in no way that a grammar would write it is none."""
        self._names, self._index, self._are_bound = names, index, are_bound
        self._whole = ObjectEnd()
        self._arguments: ObjectEnd | None = None
        self._are_told = False
        self.raw = ""
        """All of it so far."""
        self.is_call = False

    def take(self, text: str, parts: list[ToolCallPart]) -> str | None:
        """Take a piece, and add what is new of the call. Returns what follows the object; None as long as it goes on."""
        size = self._whole.find(text)
        piece = text[:size]
        self.raw += piece
        if self._arguments is None:
            begun = BEGINNING.match(self.raw)
            if begun is not None and begun.group(1) in self._names:
                self.is_call, self._arguments = True, ObjectEnd()
                parts.append(ToolCallPart(index=self._index, id=make_call_id(), name=begun.group(1)))
                piece = self.raw[begun.end() :]
        if self._arguments is not None and not self._are_told:
            end = self._arguments.find(piece)
            self._are_told = end is not None
            if piece[:end]:
                parts.append(ToolCallPart(index=self._index, arguments=piece[:end]))
        if size is None:
            return None
        if not self.is_call and not self._are_bound and not self.cannot_be_call():
            call = read_call(self.raw, self._names, self._index) if _ARGUMENTS.search(self.raw) else None
            if call is not None:
                self.is_call = True
                parts.append(call)
        return text[size:]

    def cannot_be_call(self) -> bool:
        """Say whether that is clear before its end: an answer in JSON is not held back for long."""
        key = _FIRST_KEY.match(self.raw)
        if key is None:
            return _NO_OBJECT.match(self.raw) is not None
        return not self.is_call and key.group(1) not in _CALL_KEYS


class LlamaReader:
    """Implement `CallReader`: an answer that is a call from its first letter on, or goes on as one after the mark."""

    def __init__(self, tools: Tools) -> None:
        self._names, self._are_bound = {tool.name for tool in tools.tools}, tools.are_bound
        self._held = ""
        self._may_begin = True
        """Whether a call may begin here: at the beginning, after the mark, after another call."""
        self._marked = ""
        """The mark, as long as it is not known whether a call follows."""
        self._object: CallObject | None = None
        self.count = 0

    def take(self, text: str) -> tuple[str, tuple[ToolCallPart, ...]]:
        self._held += text
        said: list[str] = []
        parts: list[ToolCallPart] = []
        while self._held and self._go_on(said, parts):
            pass
        return "".join(said), join_parts(parts)

    def end(self) -> tuple[str, tuple[ToolCallPart, ...]]:
        left = self._held
        if self._object is not None:
            left = "" if self._object.is_call else self._object.raw
            self.count += self._object.is_call
        text = self._marked + left
        self._held, self._marked, self._object, self._may_begin = "", "", None, False
        return ("" if self.count and text.isspace() else text), ()

    def _go_on(self, said: list[str], parts: list[ToolCallPart]) -> bool:
        """Read some of what is held. False when more is needed."""
        if self._object is not None:
            return self._go_on_in(self._object, said, parts)
        return self._begin(said) if self._may_begin else self._say(said)

    def _go_on_in(self, call: CallObject, said: list[str], parts: list[ToolCallPart]) -> bool:
        rest = call.take(self._held, parts)
        self._held = rest or ""
        if not call.is_call and (rest is not None or call.cannot_be_call()):
            said.append(self._marked + call.raw)
            self._object, self._marked, self._may_begin = None, "", False
        elif rest is not None:
            self._object, self._marked = None, ""
            self.count += 1
        return bool(self._held)

    def _begin(self, said: list[str]) -> bool:
        found = (_BETWEEN if self.count else _BLANK).match(self._held)
        assert found is not None  # it matches nothing at all, too
        rest = self._held[found.end() :]
        if not rest or (rest != _TAG and _TAG.startswith(rest)):
            return False
        if rest.startswith(_TAG):
            self._marked, self._held = self._marked + self._held[: found.end()] + _TAG, rest[len(_TAG) :]
        elif rest.startswith("{"):
            self._marked += "" if self.count else self._held[: found.end()]
            self._object, self._held = CallObject(self._names, self.count, self._are_bound), rest
        else:
            self._may_begin = False
            said.append(self._marked)
            self._marked = ""
        return True

    def _say(self, said: list[str]) -> bool:
        """Tell text up to the mark, or to what may become it."""
        before, mark, after = self._held.partition(_TAG)
        keep = 0 if mark else _overlap(before, _TAG)
        said.append(before[: len(before) - keep])
        self._held = after if mark else before[len(before) - keep :]
        if mark:
            self._may_begin, self._marked = True, _TAG
        return bool(mark)


class MistralReader:
    """Implement `CallReader`: a list of calls follows the mark, or a name and its arguments."""

    def __init__(self, tools: Tools) -> None:
        self._names, self._are_bound = {tool.name for tool in tools.tools}, tools.are_bound
        self._held = ""
        self._is_marked = self._is_list = False
        self._object: CallObject | None = None
        self._arguments: ObjectEnd | None = None
        """Set while the arguments of a call by name are told."""
        self.count = 0

    def take(self, text: str) -> tuple[str, tuple[ToolCallPart, ...]]:
        self._held += text
        said: list[str] = []
        parts: list[ToolCallPart] = []
        while self._held and self._go_on(said, parts):
            pass
        return "".join(said), join_parts(parts)

    def end(self) -> tuple[str, tuple[ToolCallPart, ...]]:
        text = self._held
        if self._arguments is not None or (self._object is not None and self._object.is_call):
            self.count, text = self.count + 1, ""
        elif self._object is not None:
            text = self._object.raw
        elif self._is_marked and not self._is_list:
            text = _MARK + text
        self._held, self._object, self._arguments, self._is_marked, self._is_list = "", None, None, False, False
        return ("" if self.count and text.isspace() else text), ()

    def _go_on(self, said: list[str], parts: list[ToolCallPart]) -> bool:
        """Read some of what is held. False when more is needed."""
        if self._arguments is not None:
            return self._tell_arguments(self._arguments, parts)
        if self._object is not None:
            return self._go_on_in(self._object, said, parts)
        if self._is_list:
            return self._go_on_in_list()
        return self._begin(said, parts) if self._is_marked else self._say(said)

    def _tell_arguments(self, arguments: ObjectEnd, parts: list[ToolCallPart]) -> bool:
        size = arguments.find(self._held)
        if self._held[:size]:
            parts.append(ToolCallPart(index=self.count, arguments=self._held[:size]))
        self._held = "" if size is None else self._held[size:]
        if size is not None:
            self._arguments, self._is_marked = None, False
            self.count += 1
        return bool(self._held)

    def _go_on_in(self, call: CallObject, said: list[str], parts: list[ToolCallPart]) -> bool:
        rest = call.take(self._held, parts)
        self._held = rest or ""
        if rest is not None:
            self._object = None
            if call.is_call:
                self.count += 1
            else:
                said.append(call.raw)
        return bool(self._held)

    def _go_on_in_list(self) -> bool:
        found = _BETWEEN.match(self._held)
        assert found is not None  # it matches nothing at all, too
        rest = self._held[found.end() :]
        if not rest:
            return False
        if rest[0] == "{":
            self._object, self._held = CallObject(self._names, self.count, self._are_bound), rest
            return True
        # the end of the list, or what is none
        self._is_marked = self._is_list = False
        self._held = rest[1:] if rest[0] == "]" else self._held
        return bool(self._held)

    def _begin(self, said: list[str], parts: list[ToolCallPart]) -> bool:
        """Read what follows the mark."""
        rest = self._held.lstrip()
        if not rest:
            return False
        if rest[0] == "[":
            inside = rest[1:].lstrip()
            if not inside:
                return False
            if inside[0] in "{]":
                self._is_list, self._held = True, inside
                return True
        named = _NAMED.match(self._held)
        if named is not None and named.group(1) in self._names:
            parts.append(ToolCallPart(index=self.count, id=make_call_id(), name=named.group(1)))
            self._held, self._arguments = self._held[named.end() :], ObjectEnd()
            return True
        if "{" not in self._held and "\n" not in rest and len(rest) <= _LONGEST_NAME:
            return False
        said.append(_MARK)
        self._is_marked = False
        return True

    def _say(self, said: list[str]) -> bool:
        """Tell text up to the mark, or to what may become it; white space before it is none of the answer."""
        before, mark, after = self._held.partition(_MARK)
        if mark:
            shown, self._held, self._is_marked = before.rstrip(), after, True
        else:
            size = len(before) - _overlap(before, _MARK)
            size = len(before[:size].rstrip())
            shown, self._held = before[:size], before[size:]
        if shown and not (self.count and shown.isspace()):
            said.append(shown)
        return bool(mark)


def _overlap(text: str, mark: str) -> int:
    """Return how many characters at the end may be the beginning of a mark."""
    return next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)
