"""Let an alert name its budget in plain text: a foreign key made settlement fail when the budget was deleted at that moment.

The table is small, and new: one row for each threshold that was passed since 0003.
"""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("spend", "0007_prices")]

    operations = [
        migrations.RemoveField(model_name="spendalert", name="budget"),
        migrations.AddField(
            model_name="spendalert",
            name="budget_id",
            field=models.CharField(default="", max_length=40),
            preserve_default=False,
        ),
    ]
