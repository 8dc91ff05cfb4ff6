"""However a text is cut into tokens, what is shown is the text up to the first stop string: whole characters, and no piece of one."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from workers.engine.detokenizer import Detokenizer

PIECES = ["a", "b", "ab", "aab", "END", "\n\n", " ", "é", "漢字", "👩‍🚀", "🇫🇷", "e\u0301", "\u200b", "</s>", "0", "The"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=20).map("".join)
STOPS = st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join), max_size=4).map(tuple)


@pytest.fixture(scope="module")
def tokenizer(models_dir: Path) -> Tokenizer:
    from workers.artifacts import build

    [manifest] = build.ensure(models_dir, ["smollm2-135m-instruct"])
    return Tokenizer.from_file(str(models_dir / manifest.name / manifest.version / "tokenizer.json"))


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Return what is before the stop string that is complete first, in the text as it grows, and that string."""
    for end in range(len(text) + 1):
        found = [(text.find(stop, 0, end), stop) for stop in stops if text.find(stop, 0, end) >= 0]
        if found:
            place, stop = min(found)
            return text[:place], stop
    return text, None


@given(text=TEXTS, stops=STOPS, letter_by_letter=st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_shown_is_the_text_up_to_the_stop(
    tokenizer: Tokenizer, text: str, stops: tuple[str, ...], *, letter_by_letter: bool
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if letter_by_letter:
        ids = [token for letter in text for token in tokenizer.encode(letter, add_special_tokens=False).ids]
    detokenizer, shown = Detokenizer(tokenizer, stops), ""
    for token_id in ids:
        new = detokenizer.add(token_id)
        assert "\ufffd" not in new
        shown += new
        assert not any(stop in shown for stop in stops)
        if detokenizer.stopped:
            break
    shown += detokenizer.flush()
    assert len(shown) == detokenizer.shown_chars
    if detokenizer.stopped:
        assert detokenizer.stopped_by in stops and not any(stop in shown for stop in stops)
        assert text.startswith(shown + (detokenizer.stopped_by or ""))
        # tokens may hold more than one stop string at once: then the one that begins first counts
        assert len(shown) <= len(cut(text, stops)[0])
    else:
        assert shown == text and cut(text, stops)[1] is None


def test_half_a_character_is_never_shown(tokenizer: Tokenizer) -> None:
    """An answer that is cut within a character ends before it, and bytes that are none do not hold the rest back for good."""
    ids = tokenizer.encode("x👩y", add_special_tokens=False).ids
    for count in range(len(ids)):
        detokenizer = Detokenizer(tokenizer)
        shown = "".join(detokenizer.add(token_id) for token_id in ids[:count]) + detokenizer.flush()
        assert "x👩y".startswith(shown) and "\ufffd" not in shown
    lone = ids[2]
    detokenizer = Detokenizer(tokenizer)
    shown = "".join(detokenizer.add(token_id) for token_id in [lone, lone, *tokenizer.encode(" and so on").ids])
    assert shown.endswith(" and so on")
