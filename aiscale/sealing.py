"""Keep secrets of others, such as an upstream's key, so that the database alone does not tell them: sealed with SECRET_KEY."""

import base64
import hashlib
from functools import cache

from cryptography.fernet import Fernet, InvalidToken
from django.conf import settings


class CannotUnseal(ValueError):
    """The text was sealed with another SECRET_KEY, or was changed."""


def seal(secret: str) -> str:
    return _get_box().encrypt(secret.encode()).decode()


def unseal(text: str) -> str:
    """Raises: CannotUnseal."""
    try:
        return _get_box().decrypt(text.encode()).decode()
    except InvalidToken as error:
        raise CannotUnseal("it was sealed with another SECRET_KEY: enter it again") from error


@cache
def _get_box() -> Fernet:
    digest = hashlib.sha256(b"aiscale.sealing:" + settings.SECRET_KEY.encode()).digest()
    return Fernet(base64.urlsafe_b64encode(digest))
