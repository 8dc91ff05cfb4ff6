"""Sum up what a scope spent from an index alone, when a budget is made in the middle of its period.

The new indexes serve what usage_by_time and usage_by_model did. Built without locking the table, which can be large.
"""

from django.contrib.postgres.operations import AddIndexConcurrently, RemoveIndexConcurrently
from django.db import migrations, models


def cost_index(name: str, *fields: str) -> AddIndexConcurrently:
    return AddIndexConcurrently(
        "usagerecord", models.Index(fields=[*fields, "occurred_at"], include=["cost_nanousd"], name=name)
    )


class Migration(migrations.Migration):
    atomic = False
    dependencies = [("spend", "0008_alerts_outlive_budgets")]

    operations = [
        cost_index("usage_cost_by_time"),
        cost_index("usage_cost_by_model", "model"),
        cost_index("usage_cost_by_plan", "plan"),
        cost_index("usage_cost_by_user", "user_id"),
        cost_index("usage_cost_by_key", "key_id"),
        RemoveIndexConcurrently("usagerecord", "usage_by_time"),
        RemoveIndexConcurrently("usagerecord", "usage_by_model"),
    ]
