"""Let a message be asked anew: what it was stays, out of the talk. A nullable column: no row is rewritten."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("chat", "0001_conversations")]

    operations = [
        migrations.AddField("message", "replaced_by", models.PositiveIntegerField(null=True, blank=True)),
    ]
