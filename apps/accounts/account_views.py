"""Let people see to their own account: addresses, password, a copy of what is theirs, and the end of it."""

from django.contrib import messages
from django.contrib.auth import logout
from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from aiscale.errors import AiscaleError, Code
from apps.accounts import personal_data
from apps.accounts.addresses import client_address
from apps.accounts.models import User
from apps.accounts.rates import DELETE_ACCOUNT, EXPORT, check_rate


@login_required
@never_cache
@require_safe
def show_account(request: HttpRequest) -> HttpResponse:
    return render(request, "accounts/account.html")


@login_required
@never_cache
@require_POST
def export(request: HttpRequest) -> HttpResponse:
    """Answer with a JSON file of what is the user's."""
    try:
        check_rate(request, EXPORT)
    except AiscaleError as refusal:
        messages.error(request, refusal.message)
        return redirect("accounts:account")
    response = StreamingHttpResponse(personal_data.iter_export(_user(request)), content_type="application/json")
    response.headers["Content-Disposition"] = f'attachment; filename="aiscale-{timezone.now():%Y-%m-%d}.json"'
    return response  # type: ignore[return-value]  # a StreamingHttpResponse is answered as any other


@login_required
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def delete(request: HttpRequest) -> HttpResponse:
    """Say what deleting the account brings about, and do it once the password was written."""
    user, error = _user(request), ""
    if request.method == "POST":
        try:
            check_rate(request, DELETE_ACCOUNT)
            _check_it_is_them(request, user)
            personal_data.delete_account(user, address=client_address(request))
        except AiscaleError as refusal:
            error = refusal.message
        else:
            logout(request)
            messages.success(request, "Your account is deleted, and all that was yours alone. Farewell.")
            return redirect("chat:home")
    context = {
        "parting": personal_data.plan_parting(user),
        "key_count": user.api_keys.filter(revoked_at=None).count(),
        "has_password": user.has_usable_password(),
        "error": error,
    }
    return render(request, "accounts/delete_account.html", context)


def _check_it_is_them(request: HttpRequest, user: User) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for a wrong password, or, of who has none, a wrong address."""
    if user.has_usable_password():
        if not user.check_password(request.POST.get("password", "")):
            raise AiscaleError(Code.INVALID_REQUEST, "This is not your password.", param="password")
    elif request.POST.get("email", "").strip().lower() != user.email.lower():
        raise AiscaleError(Code.INVALID_REQUEST, "This is not your address.", param="email")


def _user(request: HttpRequest) -> User:
    assert isinstance(request.user, User)
    return request.user
