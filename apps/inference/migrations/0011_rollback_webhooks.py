from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("inference", "0010_name_purges")]

    operations = [
        migrations.AddField(
            "modelversion", "webhooks_owed", models.TextField(blank=True, db_default="", default="", editable=False)
        ),
        migrations.AddField("modelversion", "webhooks_due_at", models.DateTimeField(blank=True, editable=False, null=True)),
        migrations.AddField(
            "modelversion",
            "webhook_attempts",
            models.PositiveSmallIntegerField(db_default=0, default=0, editable=False),
        ),
    ]
