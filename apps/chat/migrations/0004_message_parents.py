"""Let versions of a message be switched. A nullable column: no row is rewritten, and processes of the version before go on writing."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("chat", "0003_personal_instructions")]

    operations = [
        migrations.AddField("message", "parent_position", models.IntegerField(null=True, blank=True)),
    ]
