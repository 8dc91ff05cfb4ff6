"""Let the admin's fields that search for a row bear any value that comes back from a browser."""

from typing import Any

from django.contrib.admin.widgets import AutocompleteSelect, AutocompleteSelectMultiple
from django.core.exceptions import ValidationError
from django.http import HttpRequest
from django.utils.text import capfirst


class _Possible:
    """Look only values up that can be a row's key. Django's own asks the database for each of them, and fails."""

    field: Any

    def optgroups(self, name: str, value: list[str], attr: Any = None) -> Any:
        possible = [each for each in value if self._can_be_key(each)]
        return super().optgroups(name, possible, attr)  # type: ignore[misc]

    def _can_be_key(self, value: str) -> bool:
        try:
            self.field.remote_field.model._meta.pk.to_python(value)
        except ValidationError:
            return False
        return True


class _OneRow(_Possible, AutocompleteSelect):  # type: ignore[misc]
    pass


class _ManyRows(_Possible, AutocompleteSelectMultiple):  # type: ignore[misc]
    pass


class Autocompletes:
    """Give ``autocomplete_fields`` their widget. Stands before ModelAdmin or an inline."""

    def formfield_for_foreignkey(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        self._choose(_OneRow, db_field, request, kwargs)
        return super().formfield_for_foreignkey(db_field, request, **kwargs)  # type: ignore[misc]

    def formfield_for_manytomany(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        self._choose(_ManyRows, db_field, request, kwargs)
        return super().formfield_for_manytomany(db_field, request, **kwargs)  # type: ignore[misc]

    def _choose(self, widget: Any, db_field: Any, request: HttpRequest, kwargs: dict[str, Any]) -> None:
        if db_field.name in self.get_autocomplete_fields(request):  # type: ignore[attr-defined]
            # in a table the column's head names it for the eye alone
            attrs = {"aria-label": capfirst(db_field.verbose_name)}
            found = widget(db_field, self.admin_site, attrs=attrs, using=kwargs.get("using"))  # type: ignore[attr-defined]
            kwargs.setdefault("widget", found)
