"""Write limits in templates."""

from django import template

from apps.accounts.plans import say_rate

register = template.Library()
register.simple_tag(say_rate)
