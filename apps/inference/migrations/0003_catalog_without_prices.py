"""Drop the catalog's own prices. A web process of the release before keeps its last copy of the catalog until it is replaced."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("inference", "0002_prices_have_rows")]

    operations = [
        migrations.RemoveConstraint("model", "model_price_is_possible"),
        migrations.RemoveField("model", "prompt_nanousd_per_token"),
        migrations.RemoveField("model", "completion_nanousd_per_token"),
        migrations.AddConstraint(
            "model", models.CheckConstraint(condition=models.Q(context_tokens__gte=1), name="model_context_is_possible")
        ),
    ]
