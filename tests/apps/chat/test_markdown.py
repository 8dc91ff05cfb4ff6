"""What models write is shown as markdown, and can do nothing."""

import re
import time
from html import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.chat.highlight import LANGUAGES, MOST_CHARS, colour
from apps.chat.markdown import StreamRenderer, render


def read_text(html: str) -> str:
    """Drop the tags of colours."""
    return re.sub(r'<span class="code-[a-z]+">|</span>', "", html)


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[x](javascript:alert(1))",
        "[x](data:text/html;base64,PHNjcmlwdD4=)",
        "![x](https://elsewhere.example/spy.png)",
        "![x](data:image/png;base64,iVBORw0KGgo=)",
        '![<img src=x>](https://x.example/"><script>)',
        "`<b>`\n\n```html\n<script>1</script>\n```",
        '```"><script>x\ncode\n```',
        "[x](vbscript:x)",
    ],
)
def test_nothing_runs_and_nothing_loads(text: str) -> None:
    html = render(text)
    assert "<script" not in html and "<img" not in html and "<b>" not in html
    assert 'href="javascript' not in html and 'href="data' not in html and 'href="vbscript' not in html


def test_shows_what_people_expect() -> None:
    html = render(
        "# Title\n\n- one\n- **two**\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nx = 1 < 2\n```\n[here](https://x.example)"
    )
    assert "<h1>Title</h1>" in html and "<strong>two</strong>" in html and "<table" in html
    assert "<span>python</span>" in html and "x = 1 &lt; 2" in read_text(html) and "data-copy-code" in html
    assert 'rel="noopener noreferrer nofollow"' in html and 'target="_blank"' in html


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("![A *red* cat](https://x.example/a?b&c)", '<a href="https://x.example/a?b&amp;c" {}>Image: A red cat</a>'),
        ("![](https://x.example/a.png 'title')", '<a href="https://x.example/a.png" {}>Image</a>'),
        ("![a < b](data:image/png;base64,iVBORw0KGgo=)", "Image: a &lt; b"),
        ("![x](javascript:alert(1))", "![x](javascript:alert(1))"),
    ],
)
def test_images_become_links(text: str, html: str) -> None:
    careful = 'rel="noopener noreferrer nofollow" target="_blank"'
    assert render(text).strip() == f"<p>{html.format(careful)}</p>"


@pytest.mark.parametrize(
    ("text", "html"),
    [
        (r"so \(a_1 * b_2 * c\).", r'<p>so <code class="formula">\(a_1 * b_2 * c\)</code>.</p>'),
        ("so $x_1$, $$y_1$$", '<p>so <code class="formula">$x_1$</code>, <code class="formula">$$y_1$$</code></p>'),
        ("$5 and $10, or $5-$10", "<p>$5 and $10, or $5-$10</p>"),
        (r"\$x\$ and `$x$`", "<p>$x$ and <code>$x$</code></p>"),
        ("$<b>$", '<p><code class="formula">$&lt;b&gt;$</code></p>'),
        (
            "so\n$$\na\n\n= b\n- c\n$$\n",
            '<p>so</p>\n<pre class="formula" tabindex="0"><code>$$\na\n\n= b\n- c\n$$</code></pre>',
        ),
        ("\\[\nx\n\\]", '<pre class="formula" tabindex="0"><code>\\[\nx\n\\]</code></pre>'),
        ("$$ and *so* on", "<p>$$ and <em>so</em> on</p>"),
        ("$$x$$ is *so*", '<p><code class="formula">$$x$$</code> is <em>so</em></p>'),
    ],
)
def test_formulas_are_shown_as_they_were_written(text: str, html: str) -> None:
    assert render(text).strip() == html


@pytest.mark.parametrize("piece", ["\\(", "\\[", "$$", "$a", "\\[\n", "$$\n", "\\[\n\n"])
def test_formulas_that_never_close_take_no_time_to_speak_of(piece: str) -> None:
    began = time.process_time()
    render(piece * (20_000 // len(piece)))
    assert time.process_time() - began < 5


def test_a_formula_appears_once_it_is_closed() -> None:
    page = StreamRenderer()
    assert [page.add(piece) for piece in ("$$\n", "a\n", "\n", "= b\n", "$$\n")] == [""] * 5
    assert page.add("So").count("<pre") == 1 and page.tail == "So"


def test_columns_are_aligned_without_styles_which_the_page_may_not_have() -> None:
    html = render("| a | b | c | d |\n|---|--:|:-:|:--|\n| 1 | 2 | 3 | 4 |")
    assert "style" not in html
    for cell in ('<th class="align-right">b', '<td class="align-right">2', '<td class="align-center">3', "<td>1"):
        assert cell in html, html


def test_a_stream_shows_blocks_when_they_close() -> None:
    page = StreamRenderer()
    assert page.add("First ") == "" and page.add("paragraph.\n\n") == ""
    assert page.add("Second\n") == "<p>First paragraph.</p>\n"
    assert page.tail == "Second\n"


def test_code_is_shown_as_soon_as_its_fence_is_closed() -> None:
    page = StreamRenderer()
    assert [page.add(piece) for piece in ("```python\n", "x = 1\n", "# no heading\n", "```\n")] == ["", "", "", ""]
    assert "<span>python</span>" in page.add("That")
    assert page.tail == "That"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["word ", "\n", "\n\n", "- item\n", "```\n", "code\n", "# head\n", "1. x\n", "> q\n", "|a|\n"])
    )
)
def test_a_stream_loses_nothing(pieces: list[str]) -> None:
    page, html = StreamRenderer(), ""
    for piece in pieces:
        html += page.add(piece)
    assert page.text == "".join(pieces)
    words = render("".join(pieces)).count("word")
    assert (html + render(page.tail)).count("word") == words


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([*sorted(LANGUAGES), "", "cobol", "Python"]),
    st.lists(
        st.sampled_from(["<b>", "'", '"', "\n", "\t", "def f(x):", "# &", "/*", "1.5", "é\u2028", "-x", "\\", "{", "}"])
    ),
)
def test_colours_change_no_letter_of_code_and_let_nothing_through(language: str, pieces: list[str]) -> None:
    code = "".join(pieces)
    assert read_text(colour(code, language)) == escape(code)


def test_code_is_coloured_where_it_is_short_and_known() -> None:
    assert '<span class="code-word">def</span>' in render("```python\ndef f():\n    return 1\n```")
    assert "code-word" not in colour("def f(): pass\n" * (MOST_CHARS // 10), "python")
    assert "code-" not in colour("def f(): pass", "brainfuck")
