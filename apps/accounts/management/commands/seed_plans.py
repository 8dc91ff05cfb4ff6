from typing import Any

from django.core.management.base import BaseCommand

from apps.accounts.plans import seed_plans


class Command(BaseCommand):
    help = "Make the plans free, pro and enterprise where they are missing."

    def handle(self, *args: Any, **options: Any) -> None:
        self.stdout.write(f"{seed_plans()} plans made")
