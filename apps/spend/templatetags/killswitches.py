"""Give the admin's pages what is stopped."""

from typing import Any

from django import template

from apps.spend import killswitch, scope_names
from apps.spend.models import KillSwitch

register = template.Library()


@register.simple_tag(takes_context=True)
def active_kill_switches(context: template.Context) -> list[KillSwitch]:
    """Return the kill switches in force, each with its ``scope_name``, for staff alone. I/O: one SQL statement a page, and one more for
    each kind of scope that is stopped."""
    request: Any = context.get("request")
    if request is None or not request.user.is_staff:
        return []
    if not hasattr(request, "active_kill_switches"):
        request.active_kill_switches = scope_names.attach(killswitch.list_active())
    found: list[KillSwitch] = request.active_kill_switches
    return found
