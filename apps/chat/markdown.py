"""Render answers: markdown without HTML, links that tell nothing about where they were clicked, no images from elsewhere.

See ``aiscale/decisions/0003-markdown-is-rendered-on-the-server.md``.
"""

from collections.abc import Sequence
from html import escape

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

from apps.chat import formulas
from apps.chat.highlight import colour


class Renderer(RendererHTML):
    """Write code with its head line and copy button, tables that scroll, and careful links."""

    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        language = tokens[idx].info.strip().split(" ")[0][:40]
        return _code_block(tokens[idx].content, language)

    def code_block(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return _code_block(tokens[idx].content, "")

    def link_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        tokens[idx].attrSet("rel", "noopener noreferrer nofollow")
        tokens[idx].attrSet("target", "_blank")
        return str(self.renderToken(tokens, idx, options, env))

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        """Write a link in place of an image: what is fetched from elsewhere tells that place who reads it, and a model chose both."""
        words = self.renderInlineAsText(tokens[idx].children or [], options, env).strip()
        shown, address = escape(f"Image: {words}" if words else "Image"), str(tokens[idx].attrs["src"])
        if address.startswith("data:"):
            return shown
        return f'<a href="{escape(address)}" rel="noopener noreferrer nofollow" target="_blank">{shown}</a>'

    def bullet_list_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        # bullets and numbers stand where the list's own letters begin: Hebrew and Arabic on the right
        tokens[idx].attrSet("dir", "auto")
        return str(self.renderToken(tokens, idx, options, env))

    ordered_list_open = bullet_list_open

    def table_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return '<div class="table-scroll" tabindex="0"><table class="table">'

    def th_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        # a style within the page is what our content security policy forbids
        style = str(tokens[idx].attrs.pop("style", ""))
        if style.startswith("text-align:"):
            tokens[idx].attrSet("class", f"align-{style.removeprefix('text-align:')}")
        return str(self.renderToken(tokens, idx, options, env))

    td_open = th_open

    def table_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return "</table></div>\n"


def _code_block(code: str, language: str) -> str:
    return (
        f'<div class="code-block"><div class="code-head"><span>{escape(language) or "code"}</span>'
        '<button type="button" class="button small" data-copy-code>Copy</button></div>'
        f'<pre tabindex="0"><code>{colour(code, language)}</code></pre></div>\n'
    )


_FENCES = ("```", "~~~")

_parser = MarkdownIt("commonmark", {"html": False, "breaks": True}, renderer_cls=Renderer).enable(
    ["table", "strikethrough"]
)
formulas.read_formulas(_parser)


def render(text: str) -> str:
    """Return safe HTML. I/O: none; about a millisecond of CPU a kilobyte."""
    return str(_parser.render(text))


class StreamRenderer:
    """Render a text that still grows: whole blocks as soon as the next one has begun."""

    def __init__(self) -> None:
        self.text = ""
        self._rendered = 0

    @property
    def tail(self) -> str:
        """The text whose block is still open."""
        return self.text[self._rendered :]

    def add(self, piece: str) -> str:
        """Take more text; return the HTML of the blocks that it closed, or ''. I/O: none."""
        begins = _ends_a_block(self.tail)
        self.text += piece
        tail = self.tail
        if not ("\n" in piece or begins) or _is_open_fence(tail):
            return ""
        starts = [
            token.map[0] for token in _parser.parse(tail) if token.level == 0 and token.map and token.nesting >= 0
        ]
        if len(starts) < 2 or starts[-1] == 0:
            return ""
        lines = tail.splitlines(keepends=True)
        closed = "".join(lines[: starts[-1]])
        self._rendered += len(closed)
        return render(closed)


def _ends_a_block(tail: str) -> bool:
    """Tell whether what comes next begins a block: after a blank line, or after code or a formula was closed."""
    begins = (*_FENCES, *formulas.OPENINGS)
    return tail.endswith("\n\n") or (tail.endswith("\n") and tail.startswith(begins) and not _is_open_fence(tail))


def _is_open_fence(tail: str) -> bool:
    """Tell whether the text is code or a formula that is not closed: however long it grows, there is nothing to parse."""
    if not tail.startswith(_FENCES):
        return formulas.is_open(tail)
    mark = tail[: len(tail) - len(tail.lstrip(tail[0]))]
    return f"\n{mark}" not in tail
