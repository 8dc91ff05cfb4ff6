"""Know the caller of Django's own API (``/api/v1``) by the same keys as those of ``/v1``."""

from rest_framework.authentication import BaseAuthentication
from rest_framework.request import Request

from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import hash_key
from apps.accounts.models import ApiKey, User

_STATES = {
    "revoked": (Code.KEY_REVOKED, "This API key was revoked. Make a new one on the API keys page."),
    "expired": (Code.KEY_EXPIRED, "This API key has expired. Make a new one on the API keys page."),
}


class ApiKeyAuthentication(BaseAuthentication):
    """Read ``Authorization: Bearer sk-...``. ``request.user`` becomes the key's maker, ``request.auth`` the `ApiKey`.

    A request without that header is left to the next class (a browser's session).
    I/O: one SQL statement. Raises: AiscaleError (INVALID_API_KEY, KEY_REVOKED, KEY_EXPIRED, ACCOUNT_INACTIVE), which
    `aiscale.api_errors` puts into OpenAI's error shape.
    """

    def authenticate(self, request: Request) -> tuple[User, ApiKey] | None:
        scheme, _, raw = str(request.headers.get("Authorization", "")).strip().partition(" ")
        if scheme.lower() != "bearer":
            return None
        return get_by_key(raw.strip())

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


def get_by_key(raw: str) -> tuple[User, ApiKey]:
    """Return a raw key's maker and the key, with its organization and plan. I/O: one SQL statement. Raises: AiscaleError."""
    key = ApiKey.objects.select_related("organization__plan", "created_by").filter(digest=hash_key(raw)).first()
    if key is None:
        raise AiscaleError(
            Code.INVALID_API_KEY, "Incorrect API key provided. Check it, or make a new one on the API keys page."
        )
    if key.state in _STATES:
        raise AiscaleError(*_STATES[key.state])
    if not key.organization.is_active:
        raise AiscaleError(
            Code.ACCOUNT_INACTIVE, "This account is suspended. Write to the administrator of this service."
        )
    return key.created_by, key
