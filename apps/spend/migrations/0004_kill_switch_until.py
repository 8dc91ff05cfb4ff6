"""Let a kill switch end by itself, and keep why it was released."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("spend", "0003_budgets")]

    operations = [
        migrations.AddField("killswitch", "until_at", models.DateTimeField("until", blank=True, null=True)),
        migrations.AddField(
            "killswitch", "release_reason", models.CharField(blank=True, db_default="", max_length=300)
        ),
    ]
