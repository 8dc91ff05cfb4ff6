"""Let the service stop an organization's webhook in a way that the organization cannot undo. A constant default: no row is rewritten."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("spend", "0016_never_truncated")]

    operations = [
        migrations.AlterField(
            "webhookendpoint",
            "is_active",
            models.BooleanField("active", default=True, help_text="Its organization pauses and resumes it, too."),
        ),
        migrations.AddField(
            "webhookendpoint",
            "is_blocked",
            models.BooleanField(
                "blocked", default=False, db_default=False, help_text="Nothing is sent, and its organization cannot resume it."
            ),
        ),
    ]
