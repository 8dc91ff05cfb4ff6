import secrets
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from apps.accounts.models import User


class Command(BaseCommand):
    help = "Make the first administrator and print the password alone; print nothing when there is one."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--email", required=True)

    def handle(self, *args: Any, **options: Any) -> None:
        if User.objects.filter(is_superuser=True).exists():
            return
        password = secrets.token_urlsafe(12)
        user, _ = User.objects.get_or_create(email=options["email"].lower())
        user.is_staff = user.is_superuser = user.is_active = True
        user.set_password(password)
        user.save()
        self.stdout.write(password)
