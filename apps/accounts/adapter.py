"""Tell allauth what happens when somebody signs up."""

from typing import Any

from allauth.account.adapter import DefaultAccountAdapter
from django.db import transaction
from django.http import HttpRequest

from apps.accounts.models import User
from apps.accounts.organizations import ensure_personal_organization


class AccountAdapter(DefaultAccountAdapter):  # type: ignore[misc]
    """Give every new user an organization, in the same transaction."""

    def save_user(self, request: HttpRequest, user: User, form: Any, commit: bool = True) -> User:
        with transaction.atomic():
            saved: User = super().save_user(request, user, form, commit)
            if commit:
                ensure_personal_organization(saved)
        return saved
