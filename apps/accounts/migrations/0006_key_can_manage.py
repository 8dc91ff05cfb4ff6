"""Let a key manage its organization over the API, when its maker says so."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("accounts", "0005_key_revoked")]

    operations = [
        migrations.AddField(
            model_name="apikey",
            name="can_manage",
            field=models.BooleanField(
                db_default=False,
                default=False,
                help_text="It may manage members, invitations and keys over the API, with the rights of its maker.",
            ),
        ),
    ]
