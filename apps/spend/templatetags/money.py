"""Write money in templates."""

from django import template

from aiscale.db import format_usd

register = template.Library()
register.filter("usd", format_usd)
