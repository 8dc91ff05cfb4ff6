"""The rules of the house that no linter checks."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.core.management import call_command

from aiscale.errors import Code
from aiscale.management.commands.tour import ORDER, read_docstring
from apps.gateway.errors import STATUSES

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("Owns:", "Enter at:", "May import:", "Invariant:", "Hot path:", "If it fails:")
ROOT_ENTRIES = {
    *("aiscale", "apps", "templates", "static", "workers", "deploy", "tests", "manage.py", "pyproject.toml"),
    *("README.md", "LICENSE", "Makefile", ".ci", ".gitignore"),
}
VAGUE = {"utils", "util", "helpers", "services", "selectors", "managers", "core", "common", "misc"}
MODULE_LINES, FUNCTION_LINES = 400, 60


def list_files() -> list[Path]:
    """List what is, or would be, in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for name in names if (path := ROOT / name).is_file()]


def iter_modules(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in list_files():
        place = path.relative_to(ROOT)
        if path.suffix == ".py" and place.parts[0] in folders and "migrations" not in place.parts:
            yield place, ast.parse(path.read_text(encoding="utf-8"))


def test_nothing_else_at_the_root() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in list_files()} <= ROOT_ENTRIES


@pytest.mark.parametrize("package", ORDER)
def test_package_introduces_itself(package: str) -> None:
    text = read_docstring(ROOT, package)
    places = [text.find(f"\n{field}") for field in FIELDS]
    assert -1 not in places and places == sorted(places), f"{package}: {dict(zip(FIELDS, places, strict=True))}"


def test_tour_walks_through_every_package(capsys: pytest.CaptureFixture[str]) -> None:
    packages = {".".join(place.parent.parts) for place, _ in iter_modules("aiscale", "apps", "workers")}
    quiet = {name for name in packages if re.search(r"\.(management|settings|templatetags)\b", name) or name == "apps"}
    assert packages - quiet == set(ORDER)
    call_command("tour", no_color=True)
    printed = capsys.readouterr().out
    assert all(f"{package}\n" in printed for package in ORDER)


def test_rooms_are_small() -> None:
    large = []
    for place, module in iter_modules("aiscale", "apps", "workers", "deploy", "tests"):
        lines = len((ROOT / place).read_text(encoding="utf-8").splitlines())
        if lines > MODULE_LINES:
            large.append(f"{place}: {lines} lines")
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > FUNCTION_LINES:
                    large.append(f"{place}:{node.lineno} {node.name}: {length} lines")
    assert large == []


def test_names_say_something() -> None:
    vague = [
        str(place) for place, _ in iter_modules("aiscale", "apps", "workers") if VAGUE & {*place.parts, place.stem}
    ]
    assert vague == []


def test_lua_scripts_open_with_their_contract() -> None:
    scripts = [path for path in list_files() if path.suffix == ".lua"]
    assert len(scripts) >= 8
    for path in scripts:
        head = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("--"))
        assert all(word in head for word in ("KEYS", "ARGV", "Returns", "Example", "Atomic")), path.name


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import aiscale.wire.codec, aiscale.wire.scripts, aiscale.wire.manifest, aiscale.env, aiscale.errors",
            "django",
        ),
        # kombu looks whether django.utils is there; settings, models and all the rest must not be
        ("import workers.tasks, workers.control, workers.celery", "django.conf"),
        ("import workers.tasks, workers.control, workers.celery", "django.db"),
        ("import workers.tasks, workers.control, workers.celery", "psycopg"),
        ("import workers.engine.engine, workers.engine.runner_fake", "redis"),
        ("import aiscale.asgi, aiscale.urls", "onnxruntime"),
        ("import aiscale.asgi, aiscale.urls", "workers"),
    ],
)
def test_heavy_parts_load_only_where_used(statement: str, absent: str) -> None:
    code = f"{statement}\nimport sys\nsys.exit({absent!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{absent} was loaded by: {statement}\n{done.stderr}"


def test_repository_speaks_of_the_project_alone() -> None:
    telling = re.compile(
        r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+)/|index-url|extra-index|find-links|file:///|BEGIN [A-Z ]*PRIVATE KEY"
    )
    found = []
    for path in list_files():
        if path == Path(__file__) or path.suffix in {".png", ".svg"}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if telling.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_every_version_is_pinned() -> None:
    lines = (ROOT / "deploy" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    loose = [line for line in lines if line and not line.startswith("#") and not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert loose == []


@pytest.mark.django_db
def test_migrations_are_complete_and_named() -> None:
    call_command("makemigrations", check=True, dry_run=True, verbosity=0)
    names = [path.stem for path in ROOT.glob("apps/*/migrations/0*.py")]
    assert len(names) >= 5
    assert [name for name in names if re.search(r"_auto_|_initial$|alter_\w+_and_more", name)] == []


def test_every_refusal_has_a_status() -> None:
    assert set(STATUSES) == set(Code)


@pytest.mark.parametrize("path", [each for each in list_files() if each.suffix == ".md"], ids=lambda path: path.name)
def test_documents_are_whole(path: Path) -> None:
    """No heading twice, none inside of code, every piece of code ends, and what they point to in the repository is there."""
    headings, in_code = [], False
    text = path.read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("```"):
            in_code = not in_code
        elif re.search(r"(^|\w)#{2,4} [A-Z]", line):
            assert not in_code, line
            headings.append(line)
    assert not in_code and len(headings) == len(set(headings))
    named = re.findall(r"`((?:aiscale|apps|deploy|tests|workers)/[\w/.-]+\.\w+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
