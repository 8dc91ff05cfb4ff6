"""Have a model call a tool: the grammar of an answer that is a call, in the model's own way."""

import json
import re
from collections.abc import Callable

from aiscale.wire.jobs import Grammar
from apps.inference.tools import Style, Tool, Tools

MOST_CALLS = 16
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TOKEN = re.compile(r"<\[\d+\]>")


def make_grammar(tools: Tools, style: Style, find_token: Callable[[str], int | None]) -> Grammar | None:
    """Return the grammar of an answer that must be a call, None where the model may choose.

    ``find_token`` gives the number of a mark that is one token, control token or not, and None for one that is plain text to the model.
    """
    if not tools.must_call:
        return None
    allowed = tools.list_allowed()
    marks = [json.dumps(mark) if (token := find_token(mark)) is None else f"<[{token}]>" for mark in style.value]
    several = tools.parallel and not tools.only
    rules = _write_start(style, marks, " | ".join(f"call_{index}" for index in range(len(allowed))), several=several)
    for index, tool in enumerate(allowed):
        rules += [f"call_{index}: {_write_call(tool, style, marks, index)}", _write_arguments(tool, index)]
    return Grammar(kind="lark", source="\n".join(rules))


def _write_start(style: Style, marks: list[str], any_of: str, *, several: bool) -> list[str]:
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


def mask_tokens(source: str) -> str:
    """Put a letter in place of control tokens: to a tokenizer that has others, the grammar is the same in all else."""
    lines = source.split("\n")
    return "\n".join(line if line.startswith("arguments_") else _TOKEN.sub('"x"', line) for line in lines)


def _write_call(tool: Tool, style: Style, marks: list[str], index: int) -> str:
    if style is Style.MISTRAL_NAMED:
        return f"{json.dumps(tool.name)} {marks[1]} arguments_{index}"
    key = "parameters" if style is Style.LLAMA else "arguments"
    head = json.dumps(f'{{"name": "{tool.name}", "{key}": ')
    return f'{head} arguments_{index} "}}"'


def _write_arguments(tool: Tool, index: int) -> str:
    schema = {"type": "object"} | (tool.parameters or {"properties": {}, "additionalProperties": False})
    return f"arguments_{index}: %json {json.dumps(schema | {'x-guidance': _COMPACT})}"
