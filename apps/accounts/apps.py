from django.apps import AppConfig


class AccountsConfig(AppConfig):
    name = "apps.accounts"
    label = "accounts"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        # tasks are bound to our app in every process of Django: commands send some, too
        import aiscale.celery  # noqa: F401
