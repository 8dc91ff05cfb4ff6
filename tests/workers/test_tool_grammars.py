"""Answers that must call a tool are calls, whatever the model would say, also where the marks are tokens of their own."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from aiscale.wire.events import ToolCallPart
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


def test_the_check_knows_no_tokens_but_all_else() -> None:
    grammar = make_grammar(TOOLS, Style.HERMES, {"<tool_call>": 49_200, "</tool_call>": 49_201}.get)
    assert grammar is not None
    masked = mask_tokens(grammar.source)
    assert "<[49" not in masked and '"<[7]>"' in masked, "what a schema says stays"
