"""Explain a request to who runs the service."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from aiscale.errors import AiscaleError
from apps.spend import explanations


class Command(BaseCommand):
    help = "Say why a request was refused, or why it cost what it cost. Takes the x-request-id of an answer, or a job's id."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("request_id")

    def handle(self, *args: Any, request_id: str, **options: Any) -> None:
        try:
            parts = explanations.explain(request_id, None)
        except AiscaleError as error:
            raise CommandError(error.message) from error
        for part in parts:
            self.stdout.write(explanations.write_text(part))
