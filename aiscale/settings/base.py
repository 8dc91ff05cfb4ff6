"""Django's settings, all driven by ``aiscale.env``. One comment says why for each that is not obvious."""

import hashlib
import json
from urllib.parse import parse_qsl, unquote, urlsplit

from django.templatetags.static import static
from django.urls import reverse_lazy

from aiscale import env as environment
from aiscale.embedded_urls import embedded_database_url, embedded_redis_url, read_secret_key

ENV = environment.load()
BASE_DIR = environment.ROOT_DIR
DEBUG = ENV.debug
# `manage.py up` makes the key and keeps it in the data directory; servers set SECRET_KEY or SECRET_KEY_FILE.
SECRET_KEY = ENV.secret_key or read_secret_key(ENV.data_dir)
PUBLIC_URL = ENV.public_url
_public = urlsplit(PUBLIC_URL)
ALLOWED_HOSTS = [*ENV.allowed_hosts, _public.hostname or "localhost", "localhost", "127.0.0.1", "[::1]"]
CSRF_TRUSTED_ORIGINS = [f"{_public.scheme}://{_public.netloc}"]
if _public.scheme == "https":
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = True
    SECURE_HSTS_SECONDS = 31_536_000

INSTALLED_APPS = [
    # unfold restyles the admin, so it stands before it
    "unfold",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "servestatic.runserver_nostatic",
    "django.contrib.staticfiles",
    "django.contrib.humanize",
    "rest_framework",
    "drf_spectacular",
    "channels",
    "allauth",
    "allauth.account",
    "aiscale",  # its management commands
    "apps.accounts",
    "apps.spend",
    "apps.inference",
    "apps.gateway",
    "apps.chat",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "servestatic.middleware.ServeStaticMiddleware",
    "aiscale.security.ContentSecurityPolicyMiddleware",
    "aiscale.outage.OutageMiddleware",
    "aiscale.odd_input.OddInputMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "apps.accounts.login_limits.LoginLimitMiddleware",
    "allauth.account.middleware.AccountMiddleware",
]
ROOT_URLCONF = "aiscale.urls"
ASGI_APPLICATION = "aiscale.asgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "apps.accounts.active_organization.context",
            ],
        },
    },
]


def _database(url: str) -> dict[str, object]:
    parts = urlsplit(url)
    options: dict[str, object] = dict(parse_qsl(parts.query))
    # psycopg's own pool: connections do not climb with concurrent requests (D4)
    options["pool"] = {"min_size": 1, "max_size": 8, "timeout": 10}
    host = str(options.pop("host", "") or parts.hostname or "")
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": unquote(parts.path.lstrip("/")) or "postgres",
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": host,
        "PORT": str(options.pop("port", "") or parts.port or ""),
        "CONN_HEALTH_CHECKS": True,
        "OPTIONS": options,
    }


DATABASES = {"default": _database(ENV.database_url or embedded_database_url(ENV.data_dir))}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
REDIS_URL = ENV.redis_url or embedded_redis_url(ENV.data_dir)
# a Redis that takes connections and never answers is as good as none
_cache_timeouts = {"socket_timeout": 3, "socket_connect_timeout": 2}
CACHES = {
    "default": {
        "BACKEND": "aiscale.caches.ForgivingCache",
        "LOCATION": REDIS_URL,
        "KEY_PREFIX": "aiscale:django",
        "OPTIONS": {"fallback": "process", **_cache_timeouts},
    },
    "process": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache", "OPTIONS": {"MAX_ENTRIES": 50_000}},
    # apart: no process may believe in a copy of its own of a session that another one has ended
    "sessions": {
        "BACKEND": "django.core.cache.backends.redis.RedisCache",
        "LOCATION": REDIS_URL,
        "KEY_PREFIX": "aiscale:django",
        "OPTIONS": _cache_timeouts,
    },
}
SESSION_ENGINE = "aiscale.sessions"
SESSION_CACHE_ALIAS = "sessions"
# each data directory (each checkout) has its own cookies, so two on one host do not log each other out
_cookie_suffix = hashlib.sha256(str(ENV.data_dir).encode()).hexdigest()[:8]
SESSION_COOKIE_NAME = f"aiscale_session_{_cookie_suffix}"
CSRF_COOKIE_NAME = f"aiscale_csrf_{_cookie_suffix}"

AUTH_USER_MODEL = "accounts.User"
AUTHENTICATION_BACKENDS = [
    "django.contrib.auth.backends.ModelBackend",
    "allauth.account.auth_backends.AuthenticationBackend",
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]
LOGIN_URL = reverse_lazy("account_login")
LOGIN_REDIRECT_URL = "/"
ACCOUNT_ADAPTER = "apps.accounts.adapter.AccountAdapter"
ACCOUNT_LOGIN_METHODS = {"email"}
ACCOUNT_SIGNUP_FIELDS = ["email*", "password1*"]
ACCOUNT_USER_MODEL_USERNAME_FIELD = None
ACCOUNT_EMAIL_VERIFICATION = "optional"
ACCOUNT_LOGOUT_ON_GET = False
ACCOUNT_UNIQUE_EMAIL = True
ACCOUNT_SESSION_REMEMBER = True
ACCOUNT_EMAIL_SUBJECT_PREFIX = ""
# login_limits counts these by account and by an address that no header can fake; allauth keeps the limits of who is logged in already
ACCOUNT_RATE_LIMITS = {
    "login": None,
    "login_failed": None,
    "signup": None,
    "reset_password": None,
    "reset_password_from_key": None,
}


def _email(url: str) -> dict[str, object]:
    parts = urlsplit(url)
    if parts.scheme in ("smtp", "smtps"):
        return {
            "EMAIL_BACKEND": "django.core.mail.backends.smtp.EmailBackend",
            "EMAIL_HOST": parts.hostname or "localhost",
            "EMAIL_PORT": parts.port or (465 if parts.scheme == "smtps" else 25),
            "EMAIL_HOST_USER": unquote(parts.username or ""),
            "EMAIL_HOST_PASSWORD": unquote(parts.password or ""),
            "EMAIL_USE_SSL": parts.scheme == "smtps",
            "EMAIL_TIMEOUT": 10,
        }
    if parts.scheme == "console":
        return {"EMAIL_BACKEND": "django.core.mail.backends.console.EmailBackend"}
    # without a mail server, mails are kept as files, so that nothing is lost and `up` can say where they are
    return {
        "EMAIL_BACKEND": "django.core.mail.backends.filebased.EmailBackend",
        "EMAIL_FILE_PATH": parts.path or str(ENV.data_dir / "mail"),
    }


globals().update(_email(ENV.email_url))
DEFAULT_FROM_EMAIL = SERVER_EMAIL = ENV.email_from

LANGUAGE_CODE = "en-us"
# how the admin writes moments
FORMAT_MODULE_PATH = "aiscale.settings.formats"
TIME_ZONE = "UTC"
USE_TZ = True
STATIC_URL = "/static/"
STATICFILES_DIRS = [BASE_DIR / "static"]
STATIC_ROOT = ENV.data_dir / "static"
# no build step: ServeStatic serves the source folders as they are and lets browsers revalidate
SERVESTATIC_USE_FINDERS = True
SERVESTATIC_USE_STATIC_ROOT = False
SERVESTATIC_ALLOW_ALL_ORIGINS = False
SERVESTATIC_AUTOREFRESH = False
SERVESTATIC_MAX_AGE = 60

# callers' files; "default" and "staticfiles" are Django's own
_files_options = json.loads(ENV.files_options)
if ENV.files_backend.endswith(".FileSystemStorage"):
    _files_options = {"location": str(ENV.data_dir / "files"), **_files_options}
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    "files": {"BACKEND": ENV.files_backend, "OPTIONS": _files_options},
}
DATA_UPLOAD_MAX_MEMORY_SIZE = ENV.body_limit_bytes
X_FRAME_OPTIONS = "DENY"
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
MESSAGE_STORAGE = "django.contrib.messages.storage.session.SessionStorage"

REST_FRAMEWORK = {
    # programs bring the same keys as to /v1, browsers their session
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "apps.accounts.authentication.ApiKeyAuthentication",
        "rest_framework.authentication.SessionAuthentication",
    ],
    "EXCEPTION_HANDLER": "aiscale.api_errors.answer",
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
}

# accounts knows no models: it asks for their names here
LIST_MODEL_NAMES = "apps.inference.catalog.list_slugs"
# nor money: what a key may spend in a month is kept by
KEY_LIMITS = "apps.spend.key_limits"
# nor what the apps above it keep of a person (apps.accounts.personal_data)
PERSONAL_DATA = ["apps.spend.personal_data", "apps.chat.personal_data", "apps.gateway.personal_data"]
# spend knows no upstreams: whom a kill switch of a provider may name is asked here
LIST_PROVIDERS = "apps.inference.catalog.list_providers"
SPECTACULAR_SETTINGS = {"SCHEMA_PATH_PREFIX": "/api/v1", "OAS_VERSION": "3.1.0", "DISABLE_ERRORS_AND_WARNINGS": True}

# views of Django and DRF are limited by django-ratelimit over the shared Redis cache
RATELIMIT_USE_CACHE = "default"
# without Redis each process counts for itself (aiscale.caches): logging in goes on, and guessing stays slow
RATELIMIT_FAIL_OPEN = True
# routes that are included under a path without its slash begin with one: /api/v1/organization and .../members are both theirs
SILENCED_SYSTEM_CHECKS = ["urls.W002"]

UNFOLD = {
    "SITE_TITLE": "aiscale",
    "SITE_HEADER": "aiscale",
    "SITE_SUBHEADER": "Admin console",
    "SITE_URL": "/",
    "SITE_ICON": lambda request: static("img/mark.svg"),
    "SITE_FAVICONS": [{"rel": "icon", "type": "image/svg+xml", "href": lambda request: static("img/mark.svg")}],
    "STYLES": [lambda request: static("css/admin.css")],
    "SCRIPTS": [lambda request: static("js/admin.js")],
    "SHOW_HISTORY": True,
    "SHOW_VIEW_ON_SITE": True,
    "SIDEBAR": {"show_search": True},
    "COLORS": {
        # the green of the chat, from light to dark
        "primary": {
            "50": "oklch(98.4% .014 172)",
            "100": "oklch(95% .04 172)",
            "200": "oklch(90% .07 172)",
            "300": "oklch(83% .1 172)",
            "400": "oklch(75% .11 172)",
            "500": "oklch(64% .1 174)",
            "600": "oklch(48% .085 175)",
            "700": "oklch(42% .075 176)",
            "800": "oklch(36% .06 177)",
            "900": "oklch(31% .05 178)",
            "950": "oklch(22% .04 180)",
        }
    },
}

LOGGING_CONFIG = None
from aiscale.observability import configure_logging  # noqa: E402

configure_logging(ENV.log_level)
