"""Gather what a response comes to, item by item: messages and calls of tools, in the order in which they are made."""

from collections.abc import Iterator
from typing import Any

from aiscale.wire.events import Delta, ToolCallPart
from apps.gateway.responses import objects
from apps.inference.call_readers import ObjectEnd


class Item:
    """Hold a message, or a call where ``call`` says of what."""

    def __init__(self, response_id: str, place: int, call: ToolCallPart | None) -> None:
        self.place = place
        """Where it stands among the items."""
        self.call = call
        self._response_id = response_id
        self._pieces: list[str] = []
        self._object = ObjectEnd()
        self.is_whole = False
        """Whether the arguments of a call are a whole object: nothing more can belong to them."""

    @property
    def text(self) -> str:
        """What was said, or the call's arguments."""
        return "".join(self._pieces)

    @property
    def item_id(self) -> str:
        if self.call is None:
            return objects.make_item_id(self._response_id, self.place)
        return objects.make_call_id(self._response_id, self.call.index)

    def add(self, piece: str) -> None:
        self._pieces.append(piece)
        if self.call is not None and piece:
            self.is_whole = self._object.find(piece) is not None

    def tell_status(self, *, is_whole: bool, is_last: bool) -> str:
        """Say how it stands once the answer has ended: cut where the answer was, or never come to its own end."""
        cut = is_last or (self.call is not None and not self.is_whole)
        return "incomplete" if cut and not is_whole else "completed"

    def describe(self, status: str) -> dict[str, Any]:
        """Return the object as it is now."""
        if self.call is None:
            return objects.make_message(self.item_id, self.text, status)
        call = ToolCallPart(index=self.call.index, id=self.call.id, name=self.call.name, arguments=self.text)
        return objects.make_call(call, self._response_id, status)


class Output:
    """Hold the items of one response."""

    def __init__(self, response_id: str) -> None:
        self._response_id = response_id
        self.items: list[Item] = []

    def take(self, delta: Delta) -> Iterator[tuple[Item, str]]:
        """Yield what is new, each piece with its item: a message ends with another item, a call with the object of its arguments.

        Upstreams may tell several calls by turns; what follows a whole object is none of its call.
        """
        parts = list(delta.tool_calls)
        # a call that went on is over before anything else is said
        while parts and self.items and (last := self.items[-1].call) is not None and last.index == parts[0].index:
            yield from self._go_on(parts.pop(0))
        if delta.text:
            yield self._add(self.begin_message(), delta.text)
        for part in parts:
            yield from self._go_on(part)

    def add(self, delta: Delta) -> None:
        """Take what is new, when nobody wants to be told."""
        for _ in self.take(delta):
            pass

    def begin_message(self) -> Item:
        """Return the message that text belongs to now: the last item, or a new one."""
        return self.items[-1] if self.items and self.items[-1].call is None else self._begin(None)

    def describe(self, *, is_whole: bool) -> list[dict[str, Any]]:
        """Return all items, at least a message; the last one is not complete when the answer was cut."""
        if not self.items:
            self.begin_message()
        return [item.describe(self.tell_status(item, is_whole=is_whole)) for item in self.items]

    def tell_status(self, item: Item, *, is_whole: bool) -> str:
        return item.tell_status(is_whole=is_whole, is_last=item is self.items[-1])

    def _go_on(self, part: ToolCallPart) -> Iterator[tuple[Item, str]]:
        item = self._find_call(part.index)
        if item is None or not item.is_whole:
            yield self._add(item or self._begin(part), part.arguments)

    def _find_call(self, index: int) -> Item | None:
        return next((item for item in self.items if item.call is not None and item.call.index == index), None)

    def _begin(self, call: ToolCallPart | None) -> Item:
        item = Item(self._response_id, len(self.items), call)
        self.items.append(item)
        return item

    def _add(self, item: Item, piece: str) -> tuple[Item, str]:
        item.add(piece)
        return item, piece
