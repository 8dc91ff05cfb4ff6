"""Trip, release and list kill switches from the command line."""

import getpass
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from aiscale.errors import AiscaleError
from apps.spend import killswitch


class Command(BaseCommand):
    help = (
        "Stop every request of a scope (site, model:<slug>, organization:<id>), let it go on, or list what is stopped."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        trip = actions.add_parser("trip", help="stop a scope within a second")
        trip.add_argument("scope")
        trip.add_argument("--reason", required=True, help="shown to everybody who is stopped")
        release = actions.add_parser("release", help="let a scope go on")
        release.add_argument("scope")
        actions.add_parser("list", help="list the scopes that are stopped")

    def handle(self, *args: Any, action: str, scope: str = "", reason: str = "", **options: Any) -> None:
        by = f"{getpass.getuser()} (command line)"
        try:
            if action == "trip":
                switch = killswitch.trip(scope, reason=reason, by=by)
                self.stdout.write(f"{switch.scope} is stopped. {killswitch.describe(scope)}")
            elif action == "release":
                self.stdout.write(f"{killswitch.release(scope, by=by).scope} works again.")
            else:
                self._list()
        except AiscaleError as error:
            raise CommandError(error.message) from error

    def _list(self) -> None:
        active = killswitch.list_active()
        for switch in active:
            self.stdout.write(
                f"{switch.scope}  since {switch.tripped_at:%Y-%m-%d %H:%M:%S} UTC  by {switch.tripped_by}: {switch.reason}"
            )
        if not active:
            self.stdout.write("Nothing is stopped.")
