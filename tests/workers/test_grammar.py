"""Answers keep to their grammar, whatever the model would say; what cannot be followed fails by name, within bounds."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from aiscale.wire.manifest import read_manifest
from workers.engine.detokenizer import Detokenizer
from workers.engine.engine import Engine
from workers.engine.grammar import Grammars
from workers.engine.runner_fake import FakeRunner
from workers.engine.sampler import make_rng
from workers.engine.sequence import Output, Params, Sequence

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer"},
        "ok": {"enum": ["yes", "no"]},
    },
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}

COMPACT = {"x-guidance": {"whitespace_flexible": False}}


class NoisyRunner(FakeRunner):
    """Find tokens likely by chance: nothing of a grammar comes from it."""

    def _logits(self, last: list[int]) -> Any:
        return np.random.default_rng(last).standard_normal((len(last), self.vocab_size)).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(smollm2_dir: Path, tokenizer: Tokenizer) -> Grammars:
    manifest = read_manifest(smollm2_dir)
    return Grammars(tokenizer, manifest.vocab_size, manifest.eos_token_ids)


def answer(grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any], seed: int) -> list[Output]:
    engine = Engine(NoisyRunner(slots=2, context_tokens=600, vocab_size=49_152), (0, 2))
    outputs: list[Output] = []
    sequence = Sequence(
        job_id="j",
        prompt=[seed + 5, 6, 7],
        params=Params(max_tokens=500, temperature=1.0, top_p=0.9),
        priority=0,
        deadline_s=1e12,
        detokenizer=Detokenizer(tokenizer),
        on_output=outputs.append,
        rng=make_rng(seed, 0),
        matcher=grammars.make_matcher("json_schema", json.dumps(schema)),
    )
    engine.submit(sequence)
    while not sequence.ended:
        engine.step()
    return outputs


@pytest.mark.parametrize("seed", range(6))
def test_noise_comes_out_as_json_of_the_schema(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    outputs = answer(grammars, tokenizer, PERSON, seed)
    text = "".join(output.text for output in outputs)
    assert outputs[-1].end == "stop"
    person = json.loads(text)
    assert list(person) == ["name", "age", "ok"] and isinstance(person["age"], int) and person["ok"] in ("yes", "no")


def test_a_batch_of_four_schemas_keeps_each_to_its_own(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """They share every step; the last one is cut by its length."""
    kinds: list[dict[str, Any]] = [
        {"type": "integer", "maximum": 99},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "minLength": 50},
    ]
    schemas = [
        {"type": "object", "properties": {f"k{at}": kind}, "required": [f"k{at}"], "additionalProperties": False}
        | COMPACT
        for at, kind in enumerate(kinds)
    ]
    engine = Engine(NoisyRunner(slots=4, context_tokens=600, vocab_size=49_152), (0, 2))
    told: list[list[Output]] = [[] for _ in schemas]
    for at, schema in enumerate(schemas):
        sequence = Sequence(
            job_id=f"j{at}",
            prompt=[at + 5, 6, 7],
            params=Params(max_tokens=12 if at == 3 else 200, temperature=1.0, top_p=0.9),
            priority=0,
            deadline_s=1e12,
            detokenizer=Detokenizer(tokenizer),
            on_output=told[at].append,
            rng=make_rng(at, 0),
            matcher=grammars.make_matcher("json_schema", json.dumps(schema)),
        )
        engine.submit(sequence)
    while not all(outputs and outputs[-1].end for outputs in told):
        engine.step()
    texts = ["".join(output.text for output in outputs) for outputs in told]
    assert [outputs[-1].end for outputs in told] == ["stop", "stop", "stop", "length"]
    number, boolean, nothing = (json.loads(text)[f"k{at}"] for at, text in enumerate(texts[:3]))
    assert type(number) is int and type(boolean) is bool and nothing is None
    assert texts[3].startswith('{"k3":"') and told[3][-1].completion_tokens == 12


def test_a_grammar_that_cannot_be_read_is_refused(grammars: Grammars) -> None:
    with pytest.raises(ValueError, match="cannot be followed"):
        grammars.make_matcher("json_schema", json.dumps({"type": "nonsense"}))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}b"},
        {"type": "string", "pattern": "(x+x+)+y" * 20},
        {"type": "array", "minItems": 1_000_000, "items": {"type": "integer"}},
        {"type": "string", "minLength": 100_000_000},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    ],
)
def test_hostile_schemas_cost_little(grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any]) -> None:
    """They end by a name or by their length, in a time that others can bear (counted as CPU, so that a busy machine may be slow)."""
    started = time.process_time()
    try:
        ended = answer(grammars, tokenizer, schema, 1)[-1].end
    except ValueError as error:
        assert "cannot be followed" in str(error)
    else:
        assert ended in ("length", "error", "stop")
    assert time.process_time() - started < 20
