from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from aiscale.errors import AiscaleError
from apps.accounts import audit
from apps.inference import traffic
from apps.inference.models import ModelVersion


class Command(BaseCommand):
    help = "Show how a model's requests are spread over its versions; start a canary, promote a version, or roll back."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("model")
        acts = parser.add_mutually_exclusive_group()
        acts.add_argument(
            "--canary", metavar="VERSION", help="send some requests to this version; --weight says how many of 100"
        )
        acts.add_argument("--promote", metavar="VERSION", help="make this version the main one")
        acts.add_argument("--roll-back", action="store_true", help="end the canary, or return to the version before")
        parser.add_argument("--weight", type=int, default=5, help="of 100 requests; 0 ends a canary (default: 5)")
        parser.add_argument("--reason", default="")

    def handle(self, *args: Any, **options: Any) -> None:
        slug, by = options["model"], audit.by_command()
        try:
            if options["canary"]:
                traffic.set_weight(slug, options["canary"], options["weight"], by=by, reason=options["reason"])
            elif options["promote"]:
                traffic.promote(slug, options["promote"], by=by, reason=options["reason"])
            elif options["roll_back"]:
                self.stdout.write(
                    traffic.roll_back(slug, by=by, reason=options["reason"] or "Asked for on the command line")
                )
        except AiscaleError as error:
            raise CommandError(error.message) from error
        rows = list(ModelVersion.objects.filter(model__slug=slug).select_related("model").order_by("created_at"))
        if not rows:
            raise CommandError(f"There are no versions of {slug[:100]!r}.")
        canaries = sum(row.weight for row in rows)
        for row in rows:
            self.stdout.write(_describe(row, 100 - canaries))


def _describe(row: ModelVersion, rest: int) -> str:
    if row.version == row.model.version:
        state = f"main, {rest} of 100"
    elif row.weight:
        state = f"canary, {row.weight} of 100; {traffic.measure(row)}"
    elif row.rolled_back_at:
        state = f"rolled back: {row.rolled_back_because}"
    else:
        state = "no requests"
    return f"{row.version}  {row.precision}  {row.size_bytes / 1e6:.0f} MB  {state}"
