from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("gateway", "0004_idempotency")]

    operations = [
        migrations.AddField("batch", "size_bytes", models.BigIntegerField(default=0, db_default=0)),
    ]
