"""Find what people posted among millions of charges, without a lock on the table."""

from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    atomic = False
    dependencies = [("spend", "0005_corrections")]

    operations = [
        AddIndexConcurrently(
            model_name="ledgertransaction",
            index=models.Index(
                condition=~models.Q(kind="usage"), fields=["created_at"], name="ledger_without_usage"
            ),
        ),
    ]
