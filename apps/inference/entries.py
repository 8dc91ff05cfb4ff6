"""Enter converted models into the catalog, each with a price to start with."""

from django.db import transaction

from aiscale.wire.manifest import Manifest
from apps.accounts import audit
from apps.inference.models import Model, ModelVersion
from apps.spend import prices

_PRICES = {
    # nano-USD a token: (prompt, completion); 50 nano-USD a token are 0.05 USD a million
    "generate": (50, 200),
    "embed": (10, 0),
    # for each character
    "classify": (0, 0),
}
_TITLES = {
    "smollm2-135m-instruct": (
        "SmolLM2 135M Instruct",
        "A small, quick chat model. It is often wrong: check what it says.",
    ),
    "all-minilm-l6-v2": ("all-MiniLM-L6-v2", "Sentence embeddings of 384 numbers, for search and comparison."),
    "moderation": ("Moderation", "Says how toxic a text is, and whether it attacks a model."),
}


def enter(manifest: Manifest, *, switch: bool) -> str:
    """Make or update a model's rows, and say what was done; name, prices and description stay as their owner left them.

    A model without a price gets one. A version that is new beside another gets requests at once with ``switch``, else when
    `traffic` says so; one that was entered before stays as it is. I/O: some SQL statements.
    """
    title, description = _TITLES.get(manifest.name, (manifest.name, ""))
    if manifest.name not in prices.map_current():
        _set_first_price(manifest)
    facts = {
        "kind": manifest.kind,
        "version": manifest.version,
        "context_tokens": manifest.context_tokens,
        "dimensions": manifest.dimensions,
    }
    with transaction.atomic():
        defaults = {"name": title, "description": description, **facts}
        row, created = Model.objects.select_for_update().get_or_create(slug=manifest.name, defaults=defaults)
        known = ModelVersion.objects.filter(model=row, version=manifest.version).exists()
        _enter_version(row, manifest)
        if created:
            return "new"
        if row.version == manifest.version or known:
            return "unchanged"
        if not switch:
            return f"version {manifest.version} stands beside {row.version}, without requests so far"
        for name, value in facts.items():
            setattr(row, name, value)
        row.save(update_fields=[*facts, "updated_at"])
        return "updated"


def _enter_version(row: Model, manifest: Manifest) -> None:
    ModelVersion.objects.update_or_create(
        model=row,
        version=manifest.version,
        defaults={
            "precision": manifest.precision,
            "batch_invariant": manifest.batch_invariant,
            "context_tokens": manifest.context_tokens,
            "dimensions": manifest.dimensions,
            "size_bytes": sum(manifest.file_sizes_bytes.values()),
            "source": manifest.source[:300],
            "license": manifest.license[:100],
            "takes_chats": manifest.chat_template is not None,
        },
    )


def _set_first_price(manifest: Manifest) -> None:
    prompt_price, completion_price = _PRICES[manifest.kind]
    terms = prices.Terms(
        prompt_nanousd_per_token=prompt_price,
        cached_prompt_nanousd_per_token=prompt_price,
        completion_nanousd_per_token=completion_price,
    )
    prices.change(manifest.name, terms, reason="The price to start with", by=audit.by_command(), confirmed=True)
