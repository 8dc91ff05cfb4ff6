"""Give the admin's first page its numbers of load."""

from django import template

from apps.inference import overview

register = template.Library()
register.simple_tag(overview.look, name="look_at_load")
