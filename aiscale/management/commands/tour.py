import ast
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

ORDER = (
    "aiscale",
    "aiscale.wire",
    "aiscale.embedded",
    "apps.accounts",
    "apps.spend",
    "apps.inference",
    "apps.inference.cache",
    "apps.gateway",
    "apps.gateway.responses",
    "apps.gateway.messages",
    "apps.gateway.files",
    "apps.gateway.batches",
    "apps.gateway.reference",
    "apps.chat",
    "workers",
    "workers.artifacts",
    "workers.engine",
)
"""From the lowest layer to the highest, then the other side of the wire."""


class Command(BaseCommand):
    help = "Walk through the house: what each package owns, where to enter it, and what holds in it."

    def handle(self, *args: Any, **options: Any) -> None:
        for package in ORDER:
            self.stdout.write(self.style.MIGRATE_HEADING(package))
            self.stdout.write(read_docstring(settings.BASE_DIR, package) + "\n")


def read_docstring(root: Path, package: str) -> str:
    """Return a package's docstring without importing it. I/O: one small file."""
    source = root.joinpath(*package.split("."), "__init__.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""
