"""Let budgets limit any scope, by day or month, and keep their totals and alerts.

A budget of an organization becomes one of the scope ``organization:<id>``. The table is small: one row for each budget that somebody set.
"""

import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models
from django.db.models import F, Q

import aiscale.db

CEILING = 9_000_000 * 1_000_000_000
PERIODS = [("daily", "a day"), ("monthly", "a month")]

NAME_SCOPES = """
    UPDATE spend_budget SET scope = 'organization:' || organization.public_id
    FROM accounts_organization organization WHERE organization.id = spend_budget.organization_id
"""
NAME_ORGANIZATIONS = """
    DELETE FROM spend_budget WHERE scope NOT LIKE 'organization:%%' OR period <> 'monthly' OR limit_nanousd IS NULL;
    UPDATE spend_budget SET organization_id = organization.id
    FROM accounts_organization organization WHERE spend_budget.scope = 'organization:' || organization.public_id
"""


class Migration(migrations.Migration):
    dependencies = [("accounts", "0001_accounts"), ("spend", "0002_append_only")]

    operations = [
        migrations.RemoveConstraint(model_name="budget", name="budget_is_plausible"),
        migrations.RenameField(model_name="budget", old_name="monthly_limit_nanousd", new_name="limit_nanousd"),
        migrations.AlterField(
            model_name="budget", name="limit_nanousd", field=aiscale.db.NanoUsdField(blank=True, null=True)
        ),
        migrations.AlterField(
            model_name="budget",
            name="organization",
            field=models.OneToOneField(
                to="accounts.organization", on_delete=django.db.models.deletion.CASCADE, related_name="budget", null=True
            ),
        ),
        migrations.AddField(
            model_name="budget", name="scope", field=models.CharField(max_length=170, default=""), preserve_default=False
        ),
        migrations.AddField(
            model_name="budget",
            name="period",
            field=models.CharField(choices=PERIODS, default="monthly", max_length=16),
        ),
        migrations.AddField(
            model_name="budget", name="time_zone", field=models.CharField(blank=True, max_length=64, default="UTC")
        ),
        migrations.AlterField(
            model_name="budget", name="time_zone", field=models.CharField(blank=True, max_length=64)
        ),
        migrations.AddField(model_name="budget", name="thresholds", field=models.JSONField(blank=True, default=list)),
        migrations.AddField(
            model_name="budget", name="raise_nanousd", field=aiscale.db.NanoUsdField(db_default=0, default=0)
        ),
        migrations.AddField(
            model_name="budget", name="raise_until", field=models.DateTimeField(blank=True, null=True)
        ),
        migrations.RunSQL(NAME_SCOPES, NAME_ORGANIZATIONS),
        migrations.RemoveField(model_name="budget", name="organization"),
        migrations.AddConstraint(
            model_name="budget",
            constraint=models.UniqueConstraint(
                fields=["scope", "period"],
                name="budget_once",
                violation_error_message="There is a budget of this scope and period already: change that one.",
            ),
        ),
        migrations.AddConstraint(
            model_name="budget",
            constraint=models.CheckConstraint(
                name="budget_period_is_known", condition=Q(period__in=["daily", "monthly"])
            ),
        ),
        migrations.AddConstraint(
            model_name="budget",
            constraint=models.CheckConstraint(
                name="budget_is_plausible",
                condition=Q(raise_nanousd__gte=0, raise_nanousd__lte=CEILING)
                & (
                    Q(limit_nanousd__isnull=True)
                    | Q(limit_nanousd__gte=0, limit_nanousd__lte=CEILING - F("raise_nanousd"))
                ),
                violation_error_message="Limit and raise together are at most 9 million US dollars.",
            ),
        ),
        migrations.AddConstraint(
            model_name="budget",
            constraint=models.CheckConstraint(
                name="budget_raise_ends",
                condition=Q(raise_nanousd=0) | Q(raise_until__isnull=False),
                violation_error_message="Say until when the limit is raised.",
            ),
        ),
        migrations.CreateModel(
            name="SpendAlert",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("scope", models.CharField(max_length=170)),
                ("period", models.CharField(choices=PERIODS, max_length=16)),
                ("period_start", models.DateTimeField()),
                ("threshold", models.CharField(max_length=40)),
                ("spent_nanousd", aiscale.db.NanoUsdField()),
                ("limit_nanousd", aiscale.db.NanoUsdField(null=True)),
                ("created_at", models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ("delivered_at", models.DateTimeField(blank=True, null=True)),
                (
                    "budget",
                    models.ForeignKey(
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="alerts",
                        to="spend.budget",
                    ),
                ),
            ],
            options={
                "indexes": [
                    models.Index(
                        condition=Q(delivered_at__isnull=True), fields=["created_at"], name="spend_alert_undelivered"
                    )
                ],
                "constraints": [
                    models.UniqueConstraint(
                        fields=["scope", "period", "period_start", "threshold"], name="spend_alert_once"
                    )
                ],
            },
        ),
        migrations.CreateModel(
            name="SpendTotal",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("scope", models.CharField(max_length=170)),
                ("period", models.CharField(choices=PERIODS, max_length=16)),
                ("start_at", models.DateTimeField()),
                ("end_at", models.DateTimeField()),
                ("spent_nanousd", aiscale.db.NanoUsdField(default=0)),
                ("revision", models.BigIntegerField(default=1)),
                ("updated_at", models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
            ],
            options={
                "indexes": [
                    models.Index(fields=["end_at"], name="spend_total_by_end"),
                    models.Index(fields=["updated_at"], name="spend_total_by_change"),
                ],
                "constraints": [
                    models.UniqueConstraint(fields=["scope", "period", "start_at", "end_at"], name="spend_total_once")
                ],
            },
        ),
    ]
