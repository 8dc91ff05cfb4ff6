"""Have a model call tools by their schemas: grammars of answers that are a call, or may hold calls, in the model's own way."""

import json
import re
from collections.abc import Callable, Iterable

from aiscale.wire.jobs import Grammar
from apps.inference import schemas
from apps.inference.tools import Style, Tool, Tools

MOST_CALLS = 16
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TOKEN = re.compile(r"<\[[\d,-]+\]>")
_ANY = r"(.|\n)*"
_BLANK = "[ \\n]{0,8}"


def make_grammar(
    tools: Tools, style: Style, find_token: Callable[[str], int | None], controls: Iterable[int] = ()
) -> Grammar | None:
    """Return the grammar of an answer that must be a call, or may hold calls of which some are strict; None where the model is free.

    ``find_token`` gives the number of a mark that is one token, control token or not, and None for one that is plain text to the model.
    ``controls`` are the control tokens that are shown, where they are: text may hold them.
    """
    allowed = tools.list_allowed()
    if not tools.are_bound:
        return None
    marks = [json.dumps(mark) if (token := find_token(mark)) is None else f"<[{token}]>" for mark in style.value]
    several = tools.parallel and not tools.only
    any_of = " | ".join(f"call_{index}" for index in range(len(allowed)))
    if tools.must_call:
        rules = _write_start(style, marks, any_of, several=several)
    else:
        tokens = [find_token(mark) for mark in style.value]
        rules = _write_free_start(style, tokens, any_of, several=several)
        rules += _write_text(style, tokens[0], sorted(set(controls) - set(tokens)), [tool.name for tool in allowed])
        marks = ["close" if style is Style.HERMES and at else mark for at, mark in enumerate(marks)]
    for index, tool in enumerate(allowed):
        is_free = style is Style.LLAMA and not tools.must_call
        call = f"HEAD_{index} arguments_{index} CALL_END" if is_free else _write_call(tool, style, marks, index)
        rules += [f"call_{index}: {call}", _write_arguments(tool, index, is_bound=tools.must_call or tool.strict)]
    return Grammar(kind="lark", source="\n".join(rules))


def list_schemas(tools: Tools) -> list[tuple[str, Grammar]]:
    """Return the schemas that arguments are held to, each with the name of its tool."""
    bound = [tool for tool in tools.list_allowed() if tools.must_call or tool.strict]
    return [(tool.name, Grammar(kind="json_schema", source=_write_schema(tool))) for tool in bound]


def mask_tokens(source: str) -> str:
    """Put a letter in place of control tokens: to a tokenizer that has others, the grammar is the same in all else."""
    lines = source.split("\n")
    return "\n".join(line if line.startswith("arguments_") else _TOKEN.sub('"x"', line) for line in lines)


def _write_start(style: Style, marks: list[str], any_of: str, *, several: bool) -> list[str]:
    """Say that an answer is a call, or calls."""
    more = f"{{0,{MOST_CALLS - 1}}}"
    if style is Style.HERMES:
        others = f' ("\\n" call){more}' if several else ""
        return [f"start: call{others}", f'call: {marks[0]} "\\n" ( {any_of} ) "\\n" {marks[1]}']
    if style is Style.MISTRAL:
        others = f' (", " call){more}' if several else ""
        return [f'start: {marks[0]} "[" call{others} "]"', f"call: {any_of}"]
    if style is Style.MISTRAL_NAMED:
        others = f" call{more}" if several else ""
        return [f"start: call{others}", f"call: {marks[0]} ( {any_of} )"]
    # Llama's templates know of one call at a time
    return [f"start: {any_of}"]


def _write_free_start(style: Style, tokens: list[int | None], any_of: str, *, several: bool) -> list[str]:
    """Say that an answer is text, in which calls follow their mark. The first mark belongs to the text before it (`_write_text`)."""
    more = f"{{0,{MOST_CALLS - 1}}}"
    if style is Style.LLAMA:
        # what follows a call may be another one, and is not told from text: nothing else does
        others = f' (";" any){more}' if several else ""
        return [f"start: first | (opening? any{others})", f"any: {any_of}"]
    if style is Style.MISTRAL:
        others = f' (", " any){more}' if several else ""
        return [f'start: (opening "[" any{others} "]")? first', f"any: {any_of}"]
    rules = [f"start: (opening any){{0,{MOST_CALLS if several else 1}}} first"]
    if style is Style.MISTRAL_NAMED:
        return [*rules, f"any: {any_of}"]
    close = json.dumps(style.value[1]) + ("" if tokens[1] is None else f" | <[{tokens[1]}]>")
    return [*rules, f'any: "\\n" ( {any_of} ) "\\n" close', f"close: {close}"]


def _write_text(style: Style, token: int | None, controls: list[int], names: list[str]) -> list[str]:
    """Write the text that is no call (``first``), and the text up to and with the mark of one (``opening``).

    A mark that is a token may still be spelled. It is read either way, and so it is either way the beginning of a call.
    """
    mark = re.escape(style.value[0])
    begins, unmarked = "", f"~/{_ANY}{mark}{_ANY}/"
    if style is Style.LLAMA:
        # without a mark, an answer that begins like a call is one
        named = f'"name"\\s*:\\s*"({"|".join(names)})"'
        head = f'\\s*\\{{\\s*("type"\\s*:\\s*"function"\\s*,\\s*)?{named}'
        begins = f" & ~/{head}{_ANY}/"
    rules = [
        f"TEXT: /(.|\\n)+/ & {unmarked}",
        f"FIRST: /(.|\\n)+/ & {unmarked}{begins}",
        f"spelled[lazy]: SPELLED\nSPELLED: /{_ANY}{mark}/",
        f"first_spelled[lazy]: FIRST_SPELLED\nFIRST_SPELLED: /{_ANY}{mark}/{begins}",
    ]
    if style is Style.LLAMA:
        kind = f'("type"{_BLANK}:{_BLANK}"function"{_BLANK},{_BLANK})?'
        rules += [
            f'HEAD_{index}: /{_BLANK}\\{{{_BLANK}{kind}"name"{_BLANK}:{_BLANK}"{name}"{_BLANK},{_BLANK}"parameters"{_BLANK}:{_BLANK}/'
            for index, name in enumerate(names)
        ]
        rules.append(f"CALL_END: /{_BLANK}\\}}/")
    opening = ["first_spelled"] if token is None else ["first_spelled", f"first <[{token}]>"]
    first = "FIRST?"
    if controls:
        first, opening = "FIRST? (control TEXT?)*", [*opening, "FIRST? (control TEXT?)* control spelled"]
        rules.append(f"control: <[{_write_ranges(controls)}]>")
    return [f"first: {first}", f"opening: {' | '.join(opening)}", *rules]


def _write_ranges(numbers: list[int]) -> str:
    """Write sorted numbers as ``1-3,7``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in ranges)


def _write_call(tool: Tool, style: Style, marks: list[str], index: int) -> str:
    if style is Style.MISTRAL_NAMED:
        return f"{json.dumps(tool.name)} {marks[1]} arguments_{index}"
    key = "parameters" if style is Style.LLAMA else "arguments"
    head = json.dumps(f'{{"name": "{tool.name}", "{key}": ')
    return f'{head} arguments_{index} "}}"'


def _write_arguments(tool: Tool, index: int, *, is_bound: bool) -> str:
    schema = _write_schema(tool) if is_bound else json.dumps({"type": "object", "x-guidance": _COMPACT})
    return f"arguments_{index}: %json {schema}"


def _write_schema(tool: Tool) -> str:
    schema = {"type": "object"} | (tool.parameters or {"properties": {}, "additionalProperties": False})
    return json.dumps(schemas.simplify(schema) | {"x-guidance": _COMPACT})
