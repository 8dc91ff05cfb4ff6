import os
import sys
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from aiscale.embedded.servers import CannotStart
from aiscale.embedded.stack import run_stack


class Command(BaseCommand):
    help = "Run everything on this machine: Postgres, Valkey, worker, tasks, settlement and web. Ctrl-C stops it."
    requires_system_checks: list[str] = []

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            run_stack(settings.ENV, self._say)
        except CannotStart as error:
            raise CommandError(f"aiscale: {error}") from error

    def _say(self, line: str) -> None:
        """Say a line to whoever still listens: nothing ends, or ends badly, because a pipe's reader or a terminal is gone."""
        try:
            self.stdout.write(line)
            self.stdout.flush()
        except OSError:
            # what could not be written would be tried once more when this process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
