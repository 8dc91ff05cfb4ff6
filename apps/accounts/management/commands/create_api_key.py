from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.core.validators import validate_email
from django.db import transaction

from apps.accounts import audit
from apps.accounts.keys import create_key
from apps.accounts.models import Plan, User
from apps.accounts.organizations import ensure_personal_organization
from apps.accounts.plans import seed_plans


class Command(BaseCommand):
    help = "Make an API key and print it alone. The user is made when missing."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--email", required=True)
        parser.add_argument("--plan", help="put the user's organization on this plan")
        parser.add_argument("--name", default="", help="what the key is for")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            validate_email(options["email"])
        except ValidationError as error:
            raise CommandError(f"{options['email']!r} is no e-mail address.") from error
        seed_plans()
        plan = Plan.objects.filter(slug=options["plan"]).first() if options["plan"] else None
        if options["plan"] and plan is None:
            known = ", ".join(Plan.objects.order_by("id").values_list("slug", flat=True))
            raise CommandError(f"There is no plan {options['plan']!r}; there are {known}.")
        with transaction.atomic():
            user = User.objects.filter(email__iexact=options["email"]).first()
            if user is None:
                user = User.objects.create_user(options["email"])
            organization = ensure_personal_organization(user)
            if plan is not None and organization.plan_id != plan.pk:
                organization.plan = plan
                organization.save(update_fields=["plan", "updated_at"])
            _, raw = create_key(organization, user, options["name"][:80], by=audit.by_command())
        self.stdout.write(raw)
