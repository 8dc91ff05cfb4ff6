from decimal import Decimal, InvalidOperation
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.core.validators import validate_email
from django.db import transaction

from aiscale.db import NANOUSD_PER_USD
from aiscale.errors import AiscaleError
from aiscale.moments import parse_moment
from apps.accounts import audit
from apps.accounts.keys import NAME_CHARS, KeyTerms, create_key, create_member_key
from apps.accounts.models import Organization, Plan, User
from apps.accounts.organizations import ensure_personal_organization
from apps.accounts.plans import seed_plans


class Command(BaseCommand):
    help = "Make an API key and print it alone. The user is made when missing."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--email", required=True, help="whose key it is")
        parser.add_argument(
            "--organization", metavar="ORG_ID", help="the shared organization that pays; the user is a member"
        )
        parser.add_argument("--plan", help="put the organization on this plan")
        parser.add_argument("--name", default="", help="what the key is for")
        parser.add_argument("--expires", metavar="WHEN", help="30m, 2h, 90d or 2027-03-01T14:30 (UTC)")
        parser.add_argument("--models", default="", help="the only models that it may use, separated by commas")
        parser.add_argument("--requests", type=int, metavar="N", help="requests in each window, at most")
        parser.add_argument("--window", type=int, metavar="SECONDS", help="the window's length; 60 when left out")
        parser.add_argument("--tokens-per-minute", type=int, metavar="N")
        parser.add_argument("--max-in-flight", type=int, metavar="N", help="requests at a time, at most")
        parser.add_argument("--monthly-limit", metavar="USD", help="what it may spend in a month, such as 5 or 0.50")
        parser.add_argument("--manage", action="store_true", help="it may also manage the organization over the API")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            validate_email(options["email"])
        except ValidationError as error:
            raise CommandError(f"{options['email']!r} is no e-mail address.") from error
        plan = _find_plan(options["plan"])
        try:
            with transaction.atomic():
                raw = self._make_key(options, plan)
        except AiscaleError as refusal:
            raise CommandError(refusal.message) from refusal
        self.stdout.write(raw)

    def _make_key(self, options: dict[str, Any], plan: Plan | None) -> str:
        terms, name = _read_terms(options), options["name"][:NAME_CHARS]
        user = User.objects.filter(email__iexact=options["email"]).first()
        shared = _find_organization(options["organization"])
        if user is None and shared is None:
            user = User.objects.create_user(options["email"])
        organization = shared or (ensure_personal_organization(user) if user else None)
        if user is None or organization is None:
            raise CommandError(f"{options['email']} has no account yet: invite them to the organization first.")
        if plan is not None and organization.plan_id != plan.pk:
            organization.plan = plan
            organization.save(update_fields=["plan", "updated_at"])
        make = create_member_key if shared else create_key
        return make(organization, user, name, terms, by=audit.by_command())[1]


def _find_plan(slug: str | None) -> Plan | None:
    seed_plans()
    if not slug:
        return None
    plan = Plan.objects.filter(slug=slug).first()
    if plan is None:
        known = ", ".join(Plan.objects.order_by("id").values_list("slug", flat=True))
        raise CommandError(f"There is no plan {slug!r}; there are {known}.")
    return plan


def _find_organization(public_id: str | None) -> Organization | None:
    if not public_id:
        return None
    found = Organization.objects.select_related("plan").filter(public_id=public_id, deleted_at=None).first()
    if found is None:
        raise CommandError(f"No organization has the id {public_id!r}. Copy it from its settings page.")
    return found


def _read_terms(options: dict[str, Any]) -> KeyTerms:
    requests, window_s = options["requests"], options["window"]
    return KeyTerms(
        expires_at=parse_moment(options["expires"], "expires") if options["expires"] else None,
        allowed_models=tuple(name.strip() for name in options["models"].split(",") if name.strip()),
        requests_per_window=requests,
        window_s=60 if requests and window_s is None else window_s,
        tokens_per_minute=options["tokens_per_minute"],
        max_in_flight=options["max_in_flight"],
        monthly_limit_nanousd=_read_usd(options["monthly_limit"]),
        can_manage=options["manage"],
    )


def _read_usd(text: str | None) -> int | None:
    try:
        nanousd = Decimal(text) * NANOUSD_PER_USD if text else None
        # more digits than a billionth of a dollar are a slip
        if nanousd is None or nanousd == int(nanousd):
            return None if nanousd is None else int(nanousd)
    except (InvalidOperation, ValueError, OverflowError):
        pass
    raise CommandError(f"{text!r} is no amount of US dollars. Write one such as 5 or 0.50.")
