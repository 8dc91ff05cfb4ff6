"""Change what tests need: fast password hashing, mails in memory. ``tests/conftest.py`` sets the addresses before."""

from aiscale.settings.base import *  # noqa: F403

PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
EMAIL_BACKEND = "django.core.mail.backends.locmem.EmailBackend"
STORAGES["default"] = {"BACKEND": "django.core.files.storage.InMemoryStorage"}  # noqa: F405
# pytest-django destroys the test database, which an open pool would prevent
DATABASES["default"]["OPTIONS"].pop("pool", None)  # type: ignore[attr-defined]  # noqa: F405
# ServeStatic looks at every file anew for each test client; the end-to-end tests serve files as servers do
SERVESTATIC_USE_FINDERS = False
