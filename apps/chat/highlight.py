"""Colour code in answers: Pygments finds the words, and six classes of ours say what they are (`static/css/chat.css`)."""

import time
from functools import cache
from html import escape

from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Generic, Keyword, Name, Number, String, _TokenType

MOST_CHARS, MOST_LINE_CHARS = 8_000, 400
"""Longer code is shown plain: some lexers take the square of a line's length in time."""
MOST_S = 0.03
"""When so much time has passed the rest is shown plain: others wait for their tokens meanwhile."""
_NAMES = (
    "bash c c++ cpp c# csharp cs css docker dockerfile go golang haskell html ini java javascript js json jsx kotlin lua markdown md php "
    "py python r rb ruby rs rust sh shell sql swift toml ts tsx typescript xml yaml yml zsh"
)
LANGUAGES = frozenset(_NAMES.split())
"""Those that are asked for. A model may write any name, and not each of Pygments' six hundred lexers is quick on any text."""
_CLASSES: tuple[tuple[_TokenType, str], ...] = (
    (Comment, "comment"),
    (String, "string"),
    (Number, "number"),
    (Keyword, "word"),
    (Name.Function, "name"),
    (Name.Class, "name"),
    (Name.Builtin, "name"),
    (Name.Decorator, "name"),
    (Name.Tag, "word"),
    (Name.Attribute, "name"),
    (Generic.Inserted, "string"),
    (Generic.Deleted, "gone"),
)


def colour(code: str, language: str) -> str:
    """Return safe HTML of the code, its text unchanged; without colours when the language is not known or the code is long."""
    lexer = _find_lexer(language.lower())
    if lexer is None or len(code) > MOST_CHARS or "\r" in code or max(map(len, code.split("\n"))) > MOST_LINE_CHARS:
        return escape(code)
    html, written, ends_at = [], 0, time.perf_counter() + MOST_S
    for kind, text in lexer.get_tokens(code):
        html.append(_write(kind, text))
        written += len(text)
        if time.perf_counter() > ends_at:
            html.append(escape(code[written:]))
            break
    return "".join(html)


def _write(kind: _TokenType, text: str) -> str:
    name = _find_class(kind)
    return f'<span class="code-{name}">{escape(text)}</span>' if name and not text.isspace() else escape(text)


@cache
def _find_class(kind: _TokenType) -> str:
    return next((name for each, name in _CLASSES if kind in each), "")


@cache
def _find_lexer(language: str) -> Lexer | None:
    return get_lexer_by_name(language, stripnl=False, ensurenl=False) if language in LANGUAGES else None
