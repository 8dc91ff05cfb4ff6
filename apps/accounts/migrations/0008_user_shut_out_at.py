from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    # the index is made beside the running service
    atomic = False

    dependencies = [("accounts", "0007_plan_weight")]

    operations = [
        migrations.AddField(
            model_name="user",
            name="shut_out_at",
            field=models.DateTimeField(blank=True, editable=False, null=True),
        ),
        AddIndexConcurrently(
            model_name="user",
            index=models.Index(
                condition=models.Q(("shut_out_at__isnull", False)), fields=["shut_out_at"], name="user_shut_out"
            ),
        ),
    ]
