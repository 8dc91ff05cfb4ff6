"""Answers that must call a tool are calls, whatever the model would say, also where the marks are tokens of their own."""

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from aiscale.wire.events import ToolCallPart
from aiscale.wire.jobs import Grammar
from apps.inference.call_readers import join_parts, make_reader
from apps.inference.tool_grammars import make_grammar, mask_tokens
from apps.inference.tools import Style, Tool, Tools
from workers.engine.grammar import Grammars

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "<[7]>"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = Tools(tools=(Tool(name="weather", parameters=SCHEMA), Tool(name="now")), must_call=True)


@pytest.fixture(scope="module", params=["control tokens", "tokens", "text"])
def marked(request: pytest.FixtureRequest, smollm2_dir: Path) -> tuple[Tokenizer, bool]:
    """SmolLM2's tokenizer, to which all marks are control tokens (as in GGUF files), tokens (as Qwen publishes them), or text."""
    tokenizer, control = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json")), request.param == "control tokens"
    if request.param != "text":
        marks = dict.fromkeys(mark for style in Style for mark in style.value)
        tokenizer.add_tokens([AddedToken(mark, special=control, normalized=False) for mark in marks])
    return tokenizer, request.param != "text"


@pytest.mark.parametrize("style", Style)
@pytest.mark.parametrize("parallel", [True, False])
def test_noise_comes_out_as_calls(marked: tuple[Tokenizer, bool], style: Style, *, parallel: bool) -> None:
    tokenizer, is_token = marked
    tools = Tools(tools=TOOLS.tools, must_call=True, parallel=parallel)
    grammar = make_grammar(tools, style, tokenizer.token_to_id if is_token else lambda _: None)
    assert grammar is not None and ("<[49" in grammar.source) == (is_token and style is not Style.LLAMA)
    [end] = [tokenizer.token_to_id("<|im_end|>")]
    grammars = Grammars(tokenizer, tokenizer.get_vocab_size(), (end,))
    for seed in range(2):
        matcher, draw, ids = grammars.make_matcher(grammar.kind, grammar.source), random.Random(seed), []
        while len(ids) < 400:
            allowed = np.flatnonzero(~matcher.list_forbidden()).tolist()
            token_id = end if end in allowed and len(ids) > 60 else draw.choice(allowed)
            assert matcher.take(token_id)
            if token_id == end:
                break
            ids.append(token_id)
        reader, parts = make_reader(style, tools), list[ToolCallPart]()
        for said, found in (reader.take(tokenizer.decode(ids, skip_special_tokens=False)), reader.end()):
            assert not said
            parts += found
        calls = join_parts(parts)
        assert calls and (parallel or len(calls) == 1) and {call.name for call in calls} <= {"weather", "now"}
        assert len(calls) == reader.count


FREE = Tools(tools=(Tool(name="weather", parameters=SCHEMA, strict=True), Tool(name="now")))
BODIES = [
    '{"name": "weather", "KEY": {"city": "Rome", "days": 30, "more": 1}}',
    '{"name":"weather","KEY":{"city":"Paris"}}',
    '{\n  "name": "weather",\n  "KEY": {\n    "days": 3\n  }\n}',
    '{"KEY": {"city": "Rome"}, "name": "weather"}',
    '{"type": "function", "name": "weather", "KEY": {"city": 1}}',
    '{"name": "weather", "KEY": "{}"}',
    '{"n\\u0061me": "weather", "KEY": {}}',
    '{"name": "nobody", "KEY": {}}',
    '{"name": "now", "KEY": {"any": ["thing"]}}',
    "weather[ARGS]{}",
    "print(1)",
]
SHAPES = {
    Style.HERMES: ["{0}{2}{1}", "{0}\n{2}\n{1}\n{0}\n{2}\n{1}", "Let me see.\n{0}\n{2}\n{1} So.", "{2}"],
    Style.LLAMA: ["{1}", "\n {1}", "{0}{1}", "So: {0}{1}", "{1}; {1}"],
    Style.MISTRAL: ["{0}[{1}]", "So. {0} [{1}, {1}]", "{0}{1}", "{1}"],
    Style.MISTRAL_NAMED: ["{0}weather{1}{3}", "So.{0}now{1}{3}{0}weather{3}", "{0}[{3}]", "{0}nobody{1}{3}"],
}
"""What a model may want to say, of the marks of a style and a body."""


def insist(
    tokenizer: Tokenizer, grammar: Grammar, grammars: Grammars, wanted: list[int], seed: int
) -> tuple[str, bool]:
    """Say what is wanted, and where that is forbidden anything else, to the end. True when nothing was forbidden."""
    [end] = [tokenizer.token_to_id("<|im_end|>")]
    matcher, draw, ids = grammars.make_matcher(grammar.kind, grammar.source), random.Random(seed), list[int]()
    wanted = [*wanted, end]
    while len(ids) < 300:
        forbidden = matcher.list_forbidden()
        token_id = wanted[len(ids)] if len(ids) < len(wanted) else end
        if forbidden[token_id]:
            token_id = end if not forbidden[end] else draw.choice(np.flatnonzero(~forbidden).tolist())
        if token_id == end:
            break
        assert matcher.take(token_id)
        ids.append(token_id)
    return tokenizer.decode(ids, skip_special_tokens=False), ids == wanted[:-1]


@pytest.mark.parametrize("style", Style)
def test_who_may_choose_is_held_to_what_is_strict(marked: tuple[Tokenizer, bool], style: Style) -> None:
    """However a model insists, each call that is read in its answer follows the strict tool's schema; text is as free as ever."""
    tokenizer, is_token = marked
    added = tokenizer.get_added_tokens_decoder().items()
    controls = [token_id for token_id, token in added if token.special] if is_token else []
    grammar = make_grammar(FREE, style, tokenizer.token_to_id if is_token else lambda _: None, controls)
    assert grammar is not None
    grammars = Grammars(tokenizer, tokenizer.get_vocab_size(), (tokenizer.token_to_id("<|im_end|>"),))
    key = "parameters" if style is Style.LLAMA else "arguments"
    read, plain = 0, ['Hello. {"name": "x"}\n[1] <b> <|im', '{"name": "Ada", "age": 36}', "", "a\n\n{}"]
    for text in plain:
        wanted = tokenizer.encode(text, add_special_tokens=False).ids
        assert insist(tokenizer, grammar, grammars, wanted, 0) == (text, True)
    for shape in SHAPES[style]:
        for body in BODIES:
            said = shape.format(*style.value, body.replace("KEY", key))
            # as its tokens, and letter by letter, the marks too
            spelled = [
                token_id for letter in said for token_id in tokenizer.encode(letter, add_special_tokens=False).ids
            ]
            for wanted in (tokenizer.encode(said, add_special_tokens=False).ids, spelled):
                answer, _ = insist(tokenizer, grammar, grammars, wanted, read)
                calls = read_all(answer, style)
                read += len(calls)
                for call in calls:
                    if call.name == "weather":
                        jsonschema.validate(json.loads(call.arguments), SCHEMA)
    assert read > 20


def read_all(answer: str, style: Style) -> tuple[ToolCallPart, ...]:
    reader, parts = make_reader(style, FREE), list[ToolCallPart]()
    for _, found in (reader.take(answer), reader.end()):
        parts += found
    return join_parts(parts)


@pytest.mark.parametrize("style", Style)
def test_calls_as_templates_write_them_are_free(marked: tuple[Tokenizer, bool], style: Style) -> None:
    tokenizer, is_token = marked
    grammar = make_grammar(FREE, style, tokenizer.token_to_id if is_token else lambda _: None)
    assert grammar is not None
    grammars = Grammars(tokenizer, tokenizer.get_vocab_size(), (tokenizer.token_to_id("<|im_end|>"),))
    arguments = '{"city": "Paris", "days": 3}'
    said = {
        Style.HERMES: 'I look.\n<tool_call>\n{"name": "weather", "arguments": BODY}\n</tool_call>',
        Style.LLAMA: '{"name": "weather", "parameters": BODY}',
        Style.MISTRAL: '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "weather", "arguments": BODY}]',
        Style.MISTRAL_NAMED: "I look.[TOOL_CALLS]weather[ARGS]BODY",
    }[style].replace("BODY", arguments)
    wanted = tokenizer.encode(said, add_special_tokens=False).ids
    assert insist(tokenizer, grammar, grammars, wanted, 0) == (said, True)
    *_, call = read_all(said, style)
    assert (call.name, call.arguments) == ("weather", arguments)


def test_where_nothing_is_strict_a_model_is_free() -> None:
    tools = Tools(tools=(Tool(name="weather", parameters=SCHEMA),))
    assert make_grammar(tools, Style.HERMES, lambda _: None) is None


def test_the_check_knows_no_tokens_but_all_else() -> None:
    grammar = make_grammar(TOOLS, Style.HERMES, {"<tool_call>": 49_200, "</tool_call>": 49_201}.get)
    assert grammar is not None
    masked = mask_tokens(grammar.source)
    assert "<[49" not in masked and '"<[7]>"' in masked, "what a schema says stays"
