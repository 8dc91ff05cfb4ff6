"""Take the catalog's prices over into `spend.Price`, from the day on which each model came."""

from typing import Any

from django.db import migrations

from aiscale.db import make_public_id


def move(apps: Any, schema_editor: Any) -> None:
    price = apps.get_model("spend", "Price")
    for model in apps.get_model("inference", "Model").objects.all():
        if not price.objects.filter(model=model.slug).exists():
            price.objects.create(
                public_id=make_public_id("price"),
                model=model.slug,
                valid_from=model.created_at,
                prompt_nanousd_per_token=model.prompt_nanousd_per_token,
                cached_prompt_nanousd_per_token=model.prompt_nanousd_per_token,
                completion_nanousd_per_token=model.completion_nanousd_per_token,
                reason="Taken over from the catalog",
            )


class Migration(migrations.Migration):
    dependencies = [("inference", "0001_catalog"), ("spend", "0007_prices")]

    operations = [migrations.RunPython(move, migrations.RunPython.noop)]
