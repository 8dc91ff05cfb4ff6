"""Keep users, the organizations that pay for them, their plans and their keys."""

from decimal import Decimal
from typing import Any, ClassVar

from django.contrib.auth.models import AbstractUser
from django.contrib.auth.models import UserManager as DjangoUserManager
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Lower
from django.utils import timezone

from aiscale.db import NANOUSD_PER_USD, NanoUsdField, Row, format_usd, make_public_id
from aiscale.wire.broker import PRIORITY_STEPS


def at_least_one(*names: str) -> Q:
    """Say that each of the named fields is empty or at least 1."""
    condition = Q()
    for name in names:
        condition &= Q(**{f"{name}__isnull": True}) | Q(**{f"{name}__gte": 1})
    return condition


class UserManager(DjangoUserManager["User"]):
    """Make users by e-mail address alone."""

    def create_user(self, email: str, password: str | None = None, **fields: Any) -> "User":  # type: ignore[override]
        if not email:
            raise ValueError("a user needs an e-mail address")
        user = self.model(email=self.normalize_email(email).lower(), **fields)
        user.set_password(password)
        user.save(using=self._db)
        return user

    def create_superuser(self, email: str, password: str | None = None, **fields: Any) -> "User":  # type: ignore[override]
        return self.create_user(email, password, **{"is_staff": True, "is_superuser": True, **fields})

    def get_by_natural_key(self, username: str | None) -> "User":
        return self.get(email__iexact=username)


class User(AbstractUser):
    """Be a person, known by an e-mail address of any case."""

    username = None  # type: ignore[assignment]
    public_id = models.CharField(max_length=40, unique=True, editable=False)
    email = models.EmailField("e-mail address", unique=True)
    shut_out_at = models.DateTimeField(null=True, blank=True, editable=False)
    """Since when it is not active: what it had running then ends, by `spend.killswitch`."""

    USERNAME_FIELD = "email"
    REQUIRED_FIELDS: ClassVar[list[str]] = []
    objects = UserManager()  # type: ignore[misc]

    class Meta:
        constraints = [models.UniqueConstraint(Lower("email"), name="user_email_once_in_any_case")]
        indexes = [models.Index(fields=["shut_out_at"], name="user_shut_out", condition=Q(shut_out_at__isnull=False))]

    def __str__(self) -> str:
        return self.email

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Who is not active any more is refused everywhere, and what they have running ends within a second."""
        from apps.accounts import mirror

        if not self.public_id:
            self.public_id = make_public_id("usr")
        fields, is_new = kwargs.get("update_fields"), self._state.adding
        says_active = fields is None or "is_active" in fields
        if says_active and self.is_active == (self.shut_out_at is not None):
            self.shut_out_at = None if self.is_active else timezone.now()
            kwargs |= {"update_fields": {*fields, "shut_out_at"}} if fields is not None else {}
        super().save(*args, **kwargs)
        if says_active and not is_new:
            mirror.publish_person(self)


class Plan(Row):
    """Say what an organization may do, and how much of it. Changes reach every process within a second."""

    PUBLIC_ID_PREFIX = "plan"

    class CacheScope(models.TextChoices):
        KEY = "key"
        ORGANIZATION = "organization"
        SITE = "site"

    class Moderation(models.TextChoices):
        OFF = "off", "no check"
        FLAG = "flag", "pass on and note"
        BLOCK = "block", "refuse"

    slug = models.SlugField(max_length=64, unique=True)
    name = models.CharField(max_length=80)
    requests_per_window = models.PositiveIntegerField()
    window_s = models.PositiveIntegerField("window, seconds")
    tokens_per_minute = models.PositiveIntegerField(
        null=True, blank=True, help_text="Prompt and output tokens together; empty: no limit."
    )
    max_in_flight = models.PositiveIntegerField("requests in flight")
    monthly_limit_nanousd = NanoUsdField("monthly spend limit")
    monthly_included_nanousd = NanoUsdField("monthly included spend", default=0, db_default=0)
    monthly_price_nanousd = NanoUsdField("price a month", default=0, db_default=0)
    allowed_models = models.JSONField(default=list, blank=True, help_text="Model names; empty allows all.")
    context_tokens = models.PositiveIntegerField(
        null=True, blank=True, help_text="The longest prompt and answer together; empty: as long as the model can."
    )
    max_output_tokens = models.PositiveIntegerField(default=1024)
    priority = models.PositiveSmallIntegerField(
        default=PRIORITY_STEPS[-1],
        choices=[(step, f"{step}{' (most urgent)' if step == 0 else ''}") for step in PRIORITY_STEPS],
    )
    weight = models.PositiveSmallIntegerField(
        "share",
        default=1,
        db_default=1,
        help_text="How much of the work of its priority an organization gets beside others that wait: 2 is twice as much as 1.",
    )
    max_queued = models.PositiveIntegerField(
        "most jobs waiting", null=True, blank=True, help_text="For one model; empty: as many as the service allows."
    )
    max_wait_s = models.PositiveIntegerField(
        "longest wait, seconds",
        null=True,
        blank=True,
        help_text="A request that is expected to wait longer is refused at once; empty: no limit.",
    )
    cache_scope = models.CharField(
        max_length=16,
        choices=CacheScope.choices,
        default=CacheScope.ORGANIZATION,
        db_default=CacheScope.ORGANIZATION,
        help_text="Who may be given an answer that was made for somebody else of the same scope.",
    )
    moderation = models.CharField(
        "toxic messages and attacks",
        max_length=16,
        choices=Moderation.choices,
        default=Moderation.OFF,
        db_default=Moderation.OFF,
        help_text="What becomes of messages that the moderation model flags, before a model is asked. When nothing can be checked, "
        "'pass on and note' passes messages on, and 'refuse' refuses them.",
    )
    cached_price_percent = models.PositiveSmallIntegerField(
        "price of cached answers, percent",
        default=25,
        db_default=25,
        validators=[MaxValueValidator(100)],
        help_text="What an answer that was known costs, of the model's price.",
    )

    class Meta:
        constraints = [
            models.CheckConstraint(
                name="plan_is_possible",
                condition=Q(
                    requests_per_window__gte=1,
                    window_s__gte=1,
                    max_in_flight__gte=1,
                    monthly_limit_nanousd__gte=0,
                    monthly_limit_nanousd__lte=9_000_000 * NANOUSD_PER_USD,
                    max_output_tokens__gte=1,
                ),
            ),
            models.CheckConstraint(
                name="plan_limits_are_possible",
                condition=at_least_one("tokens_per_minute", "max_queued", "max_wait_s")
                & (Q(context_tokens__isnull=True) | Q(context_tokens__gt=F("max_output_tokens"))),
                violation_error_message="A limit is at least 1, and the context holds the output and a prompt.",
            ),
            models.CheckConstraint(
                name="plan_money_is_plausible",
                condition=Q(
                    monthly_included_nanousd__gte=0,
                    monthly_included_nanousd__lte=F("monthly_limit_nanousd"),
                    monthly_price_nanousd__gte=0,
                    monthly_price_nanousd__lte=9_000_000 * NANOUSD_PER_USD,
                ),
                violation_error_message="The included spend is at most the monthly limit, and no amount is negative.",
            ),
            models.CheckConstraint(
                name="plan_weight_is_possible",
                condition=Q(weight__gte=1, weight__lte=1000),
                violation_error_message="A share is from 1 to 1,000.",
            ),
            models.CheckConstraint(
                name="plan_cache_scope_is_known", condition=Q(cache_scope__in=["key", "organization", "site"])
            ),
            models.CheckConstraint(
                name="plan_moderation_is_known",
                condition=Q(moderation__in=["off", "flag", "block"]),
            ),
        ]

    def __str__(self) -> str:
        return self.name

    def save(self, *args: Any, **kwargs: Any) -> None:
        from apps.accounts import mirror

        super().save(*args, **kwargs)
        mirror.publish_plan(self)


class Organization(Row):
    """Pay for requests. A personal one belongs to one user; a deleted one is kept for its ledger, without members and keys."""

    PUBLIC_ID_PREFIX = "org"

    name = models.CharField(max_length=120)
    plan = models.ForeignKey(Plan, on_delete=models.PROTECT, related_name="organizations")
    is_active = models.BooleanField(default=True, help_text="A suspended organization is refused everything.")
    personal_of = models.OneToOneField(
        User, on_delete=models.CASCADE, null=True, blank=True, related_name="personal_organization"
    )
    deleted_at = models.DateTimeField(null=True, blank=True, editable=False)
    semantic_cache = models.BooleanField(
        default=False, db_default=False, help_text="API chats that ask the same in other words share answers."
    )
    semantic_max_error_percent = models.DecimalField(
        "wrong answers of the semantic cache, percent at most",
        max_digits=3,
        decimal_places=1,
        default=Decimal("2.0"),
        db_default=Decimal("2.0"),
        validators=[MinValueValidator(Decimal("0.1")), MaxValueValidator(Decimal(10))],
        help_text="Of all questions, 0.1 to 10.",
    )

    class Meta:
        constraints = [
            models.CheckConstraint(
                name="organization_semantic_error_is_possible",
                condition=Q(semantic_max_error_percent__gte=Decimal("0.1"), semantic_max_error_percent__lte=10),
            )
        ]

    def __str__(self) -> str:
        return self.name

    def save(self, *args: Any, **kwargs: Any) -> None:
        from apps.accounts import mirror

        super().save(*args, **kwargs)
        mirror.publish_organization(self)

    @property
    def is_personal(self) -> bool:
        return self.personal_of_id is not None

    @property
    def display_name(self) -> str:
        """What its members call it: everybody's own one is "Personal"."""
        return "Personal" if self.is_personal else self.name


class Membership(Row):
    """Let a user act for an organization. The database refuses to leave an organization without an owner."""

    PUBLIC_ID_PREFIX = "mem"

    class Role(models.TextChoices):
        OWNER = "owner"
        ADMIN = "admin"
        MEMBER = "member"
        BILLING = "billing"

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="memberships")
    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=16, choices=Role.choices, default=Role.MEMBER)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["user", "organization"], name="member_once")]

    def __str__(self) -> str:
        return f"{self.user} in {self.organization}"


class Invitation(Row):
    """Ask the owner of an address to join. The link in the mail is a signature of ``public_id``; it works once, while this is
    ``pending`` and not past ``expires_at``."""

    PUBLIC_ID_PREFIX = "inv"

    class State(models.TextChoices):
        PENDING = "pending"
        ACCEPTED = "accepted"
        DECLINED = "declined"
        REVOKED = "revoked"

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="invitations")
    email = models.EmailField("e-mail address", help_text="In lower case.")
    role = models.CharField(max_length=16, choices=Membership.Role.choices, default=Membership.Role.MEMBER)
    invited_by = models.ForeignKey(User, on_delete=models.SET_NULL, null=True, related_name="invitations_made")
    state = models.CharField(max_length=16, choices=State.choices, default=State.PENDING)
    expires_at = models.DateTimeField()
    send_at = models.DateTimeField(null=True, blank=True)
    """When its mail is due, or due again after a failure. Empty once it was handed to the mail server."""
    send_attempts = models.PositiveSmallIntegerField(default=0)
    ended_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["organization", "email"], condition=models.Q(state="pending"), name="invitation_pending_once"
            ),
            models.CheckConstraint(name="invitation_in_lower_case", condition=models.Q(email=Lower("email"))),
        ]
        indexes = [
            models.Index(fields=["email"], name="invitation_by_email", condition=models.Q(state="pending")),
            models.Index(fields=["send_at"], name="invitation_due", condition=models.Q(send_at__isnull=False)),
        ]

    def __str__(self) -> str:
        return f"{self.email} to {self.organization}"

    @property
    def is_expired(self) -> bool:
        return self.state == self.State.PENDING and self.expires_at <= timezone.now()


class ApiKey(Row):
    """Let a program act for an organization. Only the key's sha256 is kept; ``hint`` is its last four characters.

    Its own limits narrow the plan's and never widen them; empty: the plan's alone count. What it may spend is a Budget of the scope
    ``key:<id>``.
    """

    PUBLIC_ID_PREFIX = "key"

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="api_keys")
    created_by = models.ForeignKey(User, on_delete=models.CASCADE, related_name="api_keys")
    name = models.CharField(max_length=80, blank=True)
    digest = models.CharField(max_length=64, unique=True, editable=False)
    hint = models.CharField(max_length=4, editable=False)
    revoked_at = models.DateTimeField(null=True, blank=True, editable=False)
    expires_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True, editable=False)
    """When a job of this key ended last, to the minute. Written by settlement."""
    requests_per_window = models.PositiveIntegerField(null=True, blank=True)
    window_s = models.PositiveIntegerField("window, seconds", null=True, blank=True)
    tokens_per_minute = models.PositiveIntegerField(null=True, blank=True)
    max_in_flight = models.PositiveIntegerField("requests in flight", null=True, blank=True)
    allowed_models = models.JSONField(
        default=list, db_default=[], blank=True, help_text="Model names; empty allows all that the plan does."
    )
    can_manage = models.BooleanField(
        default=False,
        db_default=False,
        help_text="It may manage members, invitations and keys over the API, with the rights of its maker.",
    )

    month_limit_nanousd: int | None = None
    month_spent_nanousd: int = 0
    """What it may spend this month, and has spent. No columns: `key_limits.attach` reads them."""

    class Meta:
        verbose_name = "API key"
        constraints = [
            models.CheckConstraint(
                name="key_limits_are_possible",
                condition=at_least_one("requests_per_window", "window_s", "tokens_per_minute", "max_in_flight")
                & (
                    Q(requests_per_window__isnull=True, window_s__isnull=True)
                    | Q(requests_per_window__isnull=False, window_s__isnull=False)
                ),
                violation_error_message="A limit is at least 1, and requests need a window in seconds.",
            ),
        ]
        indexes = [
            models.Index(fields=["revoked_at"], name="key_revoked", condition=Q(revoked_at__isnull=False)),
        ]

    def __str__(self) -> str:
        return self.name or f"…{self.hint}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        from apps.accounts import mirror

        super().save(*args, **kwargs)
        mirror.publish_key(self)

    @property
    def month_in_words(self) -> str:
        """What `key_limits.attach` read, '' without a limit."""
        if self.month_limit_nanousd is None:
            return ""
        return f"{format_usd(self.month_spent_nanousd)} of {format_usd(self.month_limit_nanousd)} spent this month"

    @property
    def state(self) -> str:
        """``active``, ``revoked`` or ``expired``."""
        if self.revoked_at is not None or not self.created_by.is_active:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= timezone.now() else "active"


from apps.accounts.audit_models import AuditEvent as AuditEvent  # noqa: E402  # a table of this app, too
