"""Calls are told from text, however the text is cut."""

import json
import random
import re
from typing import Any

import pytest

from aiscale.wire.events import ToolCallPart
from apps.inference.call_readers import HermesReader, join_parts, make_reader
from apps.inference.tools import Style, Tool, Tools

TOOLS = Tools(tools=(Tool(name="f"), Tool(name="g")))


def read_parts(pieces: list[str], style: Style) -> tuple[str, list[ToolCallPart]]:
    reader, text, parts = make_reader(style, TOOLS), "", []
    for said, found in [*map(reader.take, pieces), reader.end()]:
        text += said
        parts += found
    return text, list(join_parts(parts))


def read(pieces: list[str], style: Style = Style.HERMES) -> tuple[str, list[tuple[int, str, Any]]]:
    reader, text, parts = make_reader(style, TOOLS), "", []
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


LLAMA_ONE = '{"name": "f", "parameters": {"x": "} <|python_tag|> {", "y": [{}]}}'
F, G = (0, "f", {"x": "} <|python_tag|> {", "y": [{}]}), (1, "g", {})
LLAMA: list[tuple[str, str, list[tuple[int, str, Any]]]] = [
    ("a plain text {}  \n", "a plain text {}  \n", []),
    (LLAMA_ONE, "", [F]),
    (f"\n <|python_tag|>{LLAMA_ONE}", "", [F]),
    (f'{LLAMA_ONE}; {{"name": "g", "parameters": {{}}}}', "", [F, G]),
    (f'{LLAMA_ONE}\n<|python_tag|>{{"name": "g", "arguments": {{}}}}\n', "", [F, G]),
    (f"Let me see. <|python_tag|>{LLAMA_ONE}", "Let me see. ", [F]),
    ('{"type": "function", "name": "f", "parameters": {}}', "", [(0, "f", {})]),
    ('{"name": "f", "parameters": "{}"}', "", [(0, "f", {})]),
    ('{"parameters": {"x": 1}, "name": "g"}', "", [(0, "g", {"x": 1})]),
    ('{"name": "h", "parameters": {}}', '{"name": "h", "parameters": {}}', []),
    ('{"name": "f", "parameters": [1]}', '{"name": "f", "parameters": [1]}', []),
    ('{"city": "Paris", "name": "f"} so', '{"city": "Paris", "name": "f"} so', []),
    ('{"name": "f"}', '{"name": "f"}', []),
    ("{x} y", "{x} y", []),
    ("{}", "{}", []),
    ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ('{"name": "f", "para', '{"name": "f", "para', []),
    ('{"name": "f", "parameters": {}', "", [(0, "f", {})]),
    (f"{LLAMA_ONE} That is all.", " That is all.", [F]),
    ("<|pyth", "<|pyth", []),
    ("", "", []),
]

X, Y = '{"name": "f", "arguments": {"x": "]} [TOOL_CALLS]["}, "id": "abcDEF123"}', '{"name": "g", "arguments": {}}'
XF = (0, "f", {"x": "]} [TOOL_CALLS]["})
MISTRAL: list[tuple[str, str, list[tuple[int, str, Any]]]] = [
    ("a plain [text] \n", "a plain [text] \n", []),
    (f"[TOOL_CALLS][{X}]", "", [XF]),
    (f"[TOOL_CALLS] [{X}, {Y}]\n", "", [XF, G]),
    (f"Let me see. [TOOL_CALLS][{X}] So", "Let me see. So", [XF]),
    (f"[TOOL_CALLS]{Y[:-1]}", f"[TOOL_CALLS]{Y[:-1]}", []),
    ('[TOOL_CALLS]f[ARGS]{"x": [1]}', "", [(0, "f", {"x": [1]})]),
    ('[TOOL_CALLS]f{"x": 1}[TOOL_CALLS]g[CALL_ID]abcDEF123[ARGS]{}', "", [(0, "f", {"x": 1}), G]),
    ("[TOOL_CALLS]h[ARGS]{}", "[TOOL_CALLS]h[ARGS]{}", []),
    ("[TOOL_CALLS]no call at all\n", "[TOOL_CALLS]no call at all\n", []),
    ('[TOOL_CALLS][{"name": "h", "arguments": {}}]', '{"name": "h", "arguments": {}}', []),
    (f'[TOOL_CALLS][{{"name": "f", "arguments": 3}}, {Y}]', '{"name": "f", "arguments": 3}', [(0, "g", {})]),
    (f"[TOOL_CALLS][{Y}, nonsense]", ", nonsense]", [(0, "g", {})]),
    ('[TOOL_CALLS][{"name": "f", "arguments": {}', "", [(0, "f", {})]),
    ('[TOOL_CALLS][{"name": "f", "argu', '{"name": "f", "argu', []),
    ("[TOOL_CALLS]", "[TOOL_CALLS]", []),
    ("[TOOL_", "[TOOL_", []),
]


@pytest.mark.parametrize(
    ("style", "text", "said", "calls"),
    [
        *((Style.HERMES, *case) for case in CASES),
        *((Style.LLAMA, *case) for case in LLAMA),
        *((Style.MISTRAL, *case) for case in MISTRAL),
    ],
)
def test_calls_are_told_from_text(style: Style, text: str, said: str, calls: list[tuple[int, str, Any]]) -> None:
    assert read([text], style) == (said, calls)
    assert read(list(text), style) == (said, calls)
    cuts = random.Random(text)
    for _ in range(20):
        places = sorted(cuts.sample(range(len(text)), min(3, len(text)))) if text else []
        pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
        assert read(pieces, style) == (said, calls)


@pytest.mark.parametrize("style", Style)
def test_noise_is_told_whole_or_read_as_calls(style: Style) -> None:
    """Whatever a model says: nothing breaks, cuts change nothing, and what is no call is not lost."""
    pieces = [
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        ",",
        " ",
        "\n",
        ":",
        "name",
        "f",
        '{"name": "f", "arguments": {',
        "a",
        *style.value,
    ]
    draw = random.Random(style.name)
    for _ in range(400):
        text = "".join(draw.choices(pieces, k=draw.randrange(1, 14)))
        said, parts = read_parts([text], style)
        apart, more = read_parts(list(text), style)
        assert said == apart and [(p.index, p.name, p.arguments) for p in parts] == [
            (p.index, p.name, p.arguments) for p in more
        ], text
        if not parts:
            # the brackets around a list of no calls are not told, nor white space before a mark
            assert strip(said) == strip(text) and (said == text or style is not Style.LLAMA), text


def strip(text: str) -> str:
    return re.sub(r"\[TOOL_CALLS\]|[\[\],;\s]", "", text)


def test_arguments_are_told_as_they_come() -> None:
    reader = HermesReader(TOOLS)
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
    reader = HermesReader(TOOLS)
    _, [cut] = reader.take('<tool_call>{"name": "f", "arguments": {"x": 1')
    assert cut.arguments == '{"x": 1' and reader.end() == ("", ()) and reader.count == 1
    reader = HermesReader(TOOLS)
    text, [broken] = reader.take('<tool_call>{"name": "f", "arguments": {"x": </tool_call> and more')
    assert (text, broken.arguments) == (" and more", '{"x": ')


def test_text_is_told_as_soon_as_it_cannot_be_a_call() -> None:
    reader = HermesReader(TOOLS)
    assert reader.take("Hello")[0] == "Hello"
    assert reader.take(" <to")[0] == ""
    assert reader.take("p")[0] == " <top"
