"""Show what the answer cache holds and gives, and empty it."""

import json
from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db.models import Count, Sum
from django.utils import timezone

from aiscale.db import format_usd
from aiscale.errors import AiscaleError
from apps.accounts import audit
from apps.inference.cache import generations
from apps.inference.models import CachedAnswer
from apps.spend.models import UsageRecord

SCOPES = "site, model:<slug> or organization:<org_...>"


class Command(BaseCommand):
    help = "Show what the answer cache gave in the last day, or empty it."

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        stats = actions.add_parser(
            "stats", help="say what was answered by which level in the last 24 hours, and what that saved"
        )
        stats.add_argument("--json", action="store_true", help="write JSON")
        purge = actions.add_parser("purge", help="forget known answers, at once and at all levels")
        purge.add_argument("scope", help=SCOPES)
        purge.add_argument("--reason", default="", help="for the audit log")

    def handle(self, *args: Any, action: str, **options: Any) -> None:
        if action == "stats":
            self._show(options["json"])
            return
        try:
            rows = generations.purge(options["scope"], by=audit.by_command(), reason=options["reason"])
        except AiscaleError as error:
            raise CommandError(error.message) from error
        self.stdout.write(f"Known answers of {options['scope']} are forgotten ({rows} of them were kept in Postgres).")

    def _show(self, as_json: bool) -> None:
        since = timezone.now() - timedelta(days=1)
        found = (
            UsageRecord.objects.filter(occurred_at__gte=since)
            .exclude(finish_reason="error")
            .values("model", "cache")
            .annotate(requests=Count("pk"), saved_nanousd=Sum("saved_nanousd"))
            .order_by("model", "cache")
        )
        lines = [
            {
                "model": row["model"],
                "level": row["cache"] or "miss",
                "requests": row["requests"],
                "saved_nanousd": int(row["saved_nanousd"]),
            }
            for row in found
        ]
        kept = CachedAnswer.objects.filter(expires_at__gt=timezone.now()).count()
        if as_json:
            self.stdout.write(json.dumps({"last_24_hours": lines, "kept_in_postgres": kept}))
            return
        for line in lines:
            saved = format_usd(line["saved_nanousd"])
            self.stdout.write(
                f"{line['model']:<32} {line['level']:<10} {line['requests']:>10} requests   saved {saved}"
            )
        self.stdout.write(f"{kept} answers are kept in Postgres.")
