from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("spend", "0011_alert_deliveries")]

    operations = [
        migrations.AddField(
            model_name="webhookendpoint",
            name="sealed_old_secret",
            field=models.TextField(blank=True, db_default="", default="", editable=False),
        ),
        migrations.AddField(
            model_name="webhookendpoint",
            name="old_secret_until",
            field=models.DateTimeField(blank=True, editable=False, null=True),
        ),
        migrations.AlterField(
            model_name="webhookendpoint",
            name="url",
            field=models.URLField(
                "URL",
                help_text="It is told by POST, signed as Standard Webhooks are. An organization's may not be a private address.",
                max_length=500,
            ),
        ),
    ]
