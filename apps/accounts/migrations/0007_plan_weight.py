from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("accounts", "0006_key_can_manage")]

    operations = [
        migrations.AddField(
            model_name="plan",
            name="weight",
            field=models.PositiveSmallIntegerField(
                db_default=1,
                default=1,
                help_text="How much of the work of its priority an organization gets beside others that wait: 2 is twice as much as 1.",
                verbose_name="share",
            ),
        ),
        migrations.AddConstraint(
            model_name="plan",
            constraint=models.CheckConstraint(
                condition=models.Q(("weight__gte", 1), ("weight__lte", 1000)),
                name="plan_weight_is_possible",
                violation_error_message="A share is from 1 to 1,000.",
            ),
        ),
    ]
