from django.db import migrations, models

# what was entered before made vectors of the length that its model says
FILL = """
UPDATE inference_modelversion SET dimensions = inference_model.dimensions
FROM inference_model WHERE inference_model.id = inference_modelversion.model_id
"""


class Migration(migrations.Migration):
    dependencies = [("inference", "0011_rollback_webhooks")]

    operations = [
        migrations.AddField("modelversion", "dimensions", models.PositiveIntegerField(db_default=0, default=0)),
        migrations.RunSQL(FILL, migrations.RunSQL.noop),
    ]
