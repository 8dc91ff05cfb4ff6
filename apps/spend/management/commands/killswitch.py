"""Trip, release and list kill switches from the command line."""

import json
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from aiscale.errors import AiscaleError
from apps.accounts import audit
from apps.spend import killswitch, reach
from apps.spend.models import KillSwitch

SCOPES = "site, model:<slug>, plan:<slug>, organization:<org_...>, key:<key_...> or provider:<name>"


class Command(BaseCommand):
    help = f"Stop every request of a scope ({SCOPES}), let it go on, or list what is stopped."

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        trip = actions.add_parser("trip", help="stop a scope within a second")
        trip.add_argument("scope", help=SCOPES)
        trip.add_argument("--reason", required=True, help="shown to everybody who is stopped")
        trip.add_argument("--until", help="end by itself after 30m, 2h or 7d, or at 2026-03-01T14:30 (UTC)")
        release = actions.add_parser("release", help="let a scope go on")
        release.add_argument("scope")
        release.add_argument("--reason", default="", help="why it may go on, for the audit log")
        for changing in (trip, release):
            changing.add_argument("--dry-run", action="store_true", help="say what would happen, and do nothing")
            changing.add_argument("--yes", action="store_true", help="do not ask, also on a terminal")
        listing = actions.add_parser("list", help="list the scopes that are stopped")
        for every in (trip, release, listing):
            every.add_argument("--json", action="store_true", help="write JSON")

    def handle(self, *args: Any, action: str, **options: Any) -> None:
        try:
            if action == "list":
                self._list(options["json"])
            else:
                (self._trip if action == "trip" else self._release)(options)
        except AiscaleError as error:
            raise CommandError(error.message) from error

    def _trip(self, options: dict[str, Any]) -> None:
        scope, reason = options["scope"], killswitch.check_reason(options["reason"])
        until_at = killswitch.parse_end(options["until"]) if options["until"] else None
        killswitch.check_scope(scope)
        killswitch.check_end(until_at)
        if self._agreed(reach.describe_trip(scope, reason, until_at), options):
            switch = killswitch.trip(scope, reason=reason, by=audit.by_command(), until_at=until_at)
            self._tell(switch, f"{switch.scope} is stopped, {reach.say_end(switch.until_at)}.", options)

    def _release(self, options: dict[str, Any]) -> None:
        switch = next((found for found in killswitch.list_active() if found.scope == options["scope"]), None)
        if switch is None or self._agreed(reach.describe_release(switch), options):
            switch = killswitch.release(options["scope"], by=audit.by_command(), reason=options["reason"])
            self._tell(switch, f"{switch.scope} works again.", options)

    def _agreed(self, sentences: list[str], options: dict[str, Any]) -> bool:
        if not options["json"]:
            self.stdout.write("\n".join(sentences))
        if options["dry_run"]:
            if options["json"]:
                self.stdout.write(json.dumps({"would": sentences}, indent=2, ensure_ascii=False))
            return False
        if options["yes"] or options["json"] or not sys.stdin.isatty():
            return True
        return input("Do it? [y/N] ").strip().lower() in ("y", "yes")

    def _tell(self, switch: KillSwitch, sentence: str, options: dict[str, Any]) -> None:
        self.stdout.write(json.dumps(_describe(switch), indent=2) if options["json"] else sentence)

    def _list(self, as_json: bool) -> None:
        active = killswitch.list_active()
        if as_json:
            self.stdout.write(json.dumps([_describe(switch) for switch in active], indent=2))
            return
        for switch in active:
            self.stdout.write(
                f"{switch.scope}  since {switch.tripped_at:%Y-%m-%d %H:%M:%S} UTC  {reach.say_end(switch.until_at)}  "
                f"by {switch.tripped_by}: {switch.reason}"
            )
        if not active:
            self.stdout.write("Nothing is stopped.")


def _describe(switch: KillSwitch) -> dict[str, Any]:
    return {
        "id": switch.public_id,
        "scope": switch.scope,
        "reason": switch.reason,
        "tripped_by": switch.tripped_by,
        "tripped_at": switch.tripped_at.isoformat(),
        "until_at": switch.until_at.isoformat() if switch.until_at else None,
        "released_by": switch.released_by or None,
        "released_at": switch.released_at.isoformat() if switch.released_at else None,
        "release_reason": switch.release_reason or None,
    }
