"""Give the admin's first page its numbers of money."""

from django import template

from apps.spend import overview

register = template.Library()
register.simple_tag(overview.sum_up_money)
register.simple_tag(overview.list_refusals)
