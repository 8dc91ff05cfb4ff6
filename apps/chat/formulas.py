r"""Read formulas in markdown: ``$…$`` and ``\(…\)`` within a line, ``$$…$$`` and ``\[…\]`` there and as blocks.

They are shown as they were written. Without these rules markdown takes their backslashes away, and stars and underscores for emphasis.
Dollars follow pandoc's rule, so that prices stay prices: no space after the first, none before the last, and no digit behind it.
"""

import re
from html import escape

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

MOST_CHARS, MOST_LINES = 1_000, 50
"""Of one formula. What opens and never closes is looked through no further, however often it does."""
_PAIRS = {"$$": "$$", "\\[": "\\]", "\\(": "\\)"}
OPENINGS = ("$$", "\\[")
"""Of formulas that are blocks."""
_DOLLARS = re.compile(r"\$(?![\s$])(?:\\.|[^$\\\n])*(?<![\s\\])\$(?![0-9$])")


def read_formulas(parser: MarkdownIt) -> None:
    """Teach a parser to read formulas."""
    parser.inline.ruler.before("escape", "formula", _read_inline)
    parser.block.ruler.before("fence", "formula_block", _read_block, {"alt": ["paragraph", "blockquote", "list"]})
    parser.add_render_rule("formula", lambda _, tokens, index, *rest: _write(tokens[index].content))
    parser.add_render_rule("formula_block", lambda _, tokens, index, *rest: _write_block(tokens[index].content))


def is_open(text: str) -> bool:
    """Tell whether a text begins with a block's formula that is not closed yet."""
    return text.startswith(OPENINGS) and _PAIRS[text[:2]] not in text[2:] and text.count("\n") < MOST_LINES


def _read_inline(state: StateInline, silent: bool) -> bool:
    end = _find_end(state.src, state.pos, state.posMax)
    if end is None:
        return False
    if not silent:
        state.push("formula", "", 0).content = state.src[state.pos : end]
    state.pos = end
    return True


def _find_end(text: str, start: int, most: int) -> int | None:
    if text[start] not in "$\\":
        return None
    most = min(most, start + MOST_CHARS)
    closing = _PAIRS.get(text[start : start + 2])
    if closing is None:
        found = _DOLLARS.match(text, start, most) if text[start] == "$" else None
        return found.end() if found else None
    at = text.find(closing, start + 2, most)
    return at + 2 if at >= 0 and text[start + 2 : at].strip() else None


def _read_block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    opening = _read_line(state, start)
    if not opening.startswith(OPENINGS) or state.is_code_block(start):
        return False
    closing = _PAIRS[opening[:2]]
    for line in range(start, min(end, start + MOST_LINES)):
        if state.sCount[line] < state.blkIndent and not state.isEmpty(line):
            return False
        before, found, after = _read_line(state, line)[2 if line == start else 0 :].partition(closing)
        if found:
            break
    else:
        return False
    if after or (line == start and not before.strip()):
        # something follows on the same line: a paragraph with a formula in it
        return False
    if not silent:
        token = state.push("formula_block", "", 0)
        token.content = state.getLines(start, line + 1, state.blkIndent, False).strip()
        token.map = [start, line + 1]
        state.line = line + 1
    return True


def _read_line(state: StateBlock, line: int) -> str:
    return state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]].rstrip()


def _write(source: str) -> str:
    return f'<code class="formula">{escape(source)}</code>'


def _write_block(source: str) -> str:
    return f'<pre class="formula" tabindex="0"><code>{escape(source)}</code></pre>\n'
