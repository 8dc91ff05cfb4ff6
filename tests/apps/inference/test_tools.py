"""Calls are told from text, however the text is cut."""

import json
import random
from typing import Any

import pytest

from apps.inference.tools import CallReader, Tool, Tools, join_parts

TOOLS = Tools(tools=(Tool(name="f"), Tool(name="g")))


def read(pieces: list[str]) -> tuple[str, list[tuple[int, str, Any]]]:
    reader, text, parts = CallReader(TOOLS), "", []
    for said, found in [*map(reader.take, pieces), reader.end()]:
        text += said
        parts += found
    calls = join_parts(parts)
    assert all(call.id.startswith("call_") for call in calls)
    return text, [(call.index, call.name, json.loads(call.arguments)) for call in calls]


ONE = '<tool_call>\n{"name": "f", "arguments": {"x": "</tool"}}\n</tool_call>'
TWO = '<tool_call>{"name": "g", "arguments": "{}"}</tool_call>'

CASES: list[tuple[str, str, list[tuple[int, str, Any]]]] = [
    ("a plain text  \n", "a plain text  \n", []),
    (ONE, "", [(0, "f", {"x": "</tool"})]),
    (f"{ONE}\n{TWO}\n", "", [(0, "f", {"x": "</tool"}), (1, "g", {})]),
    (f"Let me see.\n{ONE} and {TWO}", "Let me see. and", [(0, "f", {"x": "</tool"}), (1, "g", {})]),
    ("a < b <tool_", "a < b <tool_", []),
    ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
    (
        '<tool_call>{"name": "h", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "h", "arguments": {}}</tool_call>',
        [],
    ),
    (
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        [],
    ),
    ('<tool_call>{"name": "f", "arguments": {}}', "", [(0, "f", {})]),
    ('<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    (
        f'<tool_call>{{"name": "f", "arguments": {{"x": "</tool_call> \\" {{ [", "y": [{{}}]}}}}</tool_call> so {TWO}',
        " so",
        [(0, "f", {"x": '</tool_call> " { [', "y": [{}]}), (1, "g", {})],
    ),
]


@pytest.mark.parametrize(("text", "said", "calls"), CASES)
def test_calls_are_told_from_text(text: str, said: str, calls: list[tuple[int, str, Any]]) -> None:
    assert read([text]) == (said, calls)
    assert read(list(text)) == (said, calls)
    cuts = random.Random(text)
    for _ in range(20):
        places = sorted(cuts.sample(range(len(text)), min(3, len(text) - 1)))
        pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
        assert read(pieces) == (said, calls)


def test_arguments_are_told_as_they_come() -> None:
    reader = CallReader(TOOLS)
    assert reader.take('<tool_call>\n{"name": "f", "arguments": ') == ("", ())
    _, [head] = reader.take('{"city": "Pa')
    assert (head.index, head.name, head.arguments) == (0, "f", '{"city": "Pa') and head.id
    _, [more] = reader.take('ris"')
    assert (more.index, more.id, more.name, more.arguments) == (0, "", "", 'ris"')
    _, [last] = reader.take("}}\n</tool_call>\nDone")
    assert last.arguments == "}" and reader.count == 1
    assert reader.end() == ("", ())


def test_a_call_that_is_cut_or_broken_ends_all_the_same() -> None:
    """What was told stays told; what follows is text again."""
    reader = CallReader(TOOLS)
    _, [cut] = reader.take('<tool_call>{"name": "f", "arguments": {"x": 1')
    assert cut.arguments == '{"x": 1' and reader.end() == ("", ()) and reader.count == 1
    reader = CallReader(TOOLS)
    text, [broken] = reader.take('<tool_call>{"name": "f", "arguments": {"x": </tool_call> and more')
    assert (text, broken.arguments) == (" and more", '{"x": ')


def test_text_is_told_as_soon_as_it_cannot_be_a_call() -> None:
    reader = CallReader(TOOLS)
    assert reader.take("Hello")[0] == "Hello"
    assert reader.take(" <to")[0] == ""
    assert reader.take("p")[0] == " <top"
