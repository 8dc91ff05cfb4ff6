"""Show what a terminal and a log see of a download."""

import io

from workers.artifacts.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_gets_two_plain_lines() -> None:
    stream = io.StringIO()
    with Bar("fetching m", 5_000_000, stream) as bar:
        bar.show(1_000_000)
    lines = stream.getvalue().splitlines()
    assert lines == ["fetching m (5 MB)", "fetching m: 0 s"]


def test_terminal_sees_a_bar_that_never_overruns() -> None:
    stream = Terminal()
    with Bar("fetching m", 5_000_000, stream) as bar:
        bar.show(2_500_000)
        bar.show(50_000_000)
    frames = stream.getvalue().rstrip("\n").split("\r")[1:]
    assert frames[0].count("█") == 14 and frames[0].endswith("2 of 5 MB")
    assert frames[-1].count("█") == 28 and frames[-1].endswith("5 of 5 MB")
    assert len({len(frame) for frame in frames}) == 1, "each frame covers the one before"
