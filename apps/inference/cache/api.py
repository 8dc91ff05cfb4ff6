"""Answer ``/api/v1/organizations/<id>/cache``: what the cache did, and emptying it."""

from typing import Any

import msgspec
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from apps.accounts.api_access import read_access
from apps.accounts.api_shapes import Shape, document
from apps.accounts.roles import Right
from apps.inference.cache import generations, reports
from apps.inference.cache.reports import CacheReport
from apps.spend.statement_files import format_amount


class LevelShape(Shape[Any]):
    level = serializers.ChoiceField(choices=list(reports.LEVELS))
    requests = serializers.IntegerField()
    saved_nanousd = serializers.IntegerField()


class SemanticShape(Shape[Any]):
    lookups = serializers.IntegerField(help_text="Chats for which an alike question was looked for.")
    expected_wrong_percent = serializers.FloatField(
        help_text="Of these, how many were answered wrongly, in expectation."
    )
    bound_percent = serializers.FloatField(help_text="What it stays below.")
    entries = serializers.IntegerField(help_text="Answers that are kept.")
    compared = serializers.IntegerField(help_text="Times the model was asked although an alike question was known.")
    agreed = serializers.IntegerField(help_text="Times it said the same then.")
    new_entry_threshold = serializers.FloatField(
        allow_null=True, help_text="The similarity from which on a new answer may be given; null: none is enough."
    )
    thresholds = serializers.ListField(
        child=serializers.FloatField(),
        allow_null=True,
        help_text="The middle half of what the answers learned, from and to.",
    )


class CacheShape(Shape[Any]):
    object = serializers.CharField()
    days = serializers.IntegerField()
    requests = serializers.IntegerField()
    hits = serializers.IntegerField(help_text="Requests whose whole answer was known.")
    saved_nanousd = serializers.IntegerField(help_text="What these, and parts that were known, cost less.")
    saved_usd = serializers.CharField()
    levels = LevelShape(many=True)
    semantic = SemanticShape(allow_null=True)


class PurgedShape(Shape[Any]):
    object = serializers.CharField()
    organization = serializers.CharField()
    purged = serializers.BooleanField()


class Cache(APIView):
    @document("Show what the cache did", CacheShape)
    def get(self, request: Request, organization_id: str) -> Response:
        """In the last 30 days."""
        access = read_access(request, organization_id, Right.SEE_USAGE)
        return Response(describe(reports.build(access.organization)))

    @document("Forget all known answers", PurgedShape)
    def delete(self, request: Request, organization_id: str) -> Response:
        """Of this organization, at all levels and at once: the next requests are computed."""
        access = read_access(request, organization_id, Right.SET_CACHE)
        generations.purge(f"organization:{access.organization.public_id}", by=access.actor)
        return Response({"object": "cache.purged", "organization": access.organization.public_id, "purged": True})


def describe(report: CacheReport) -> dict[str, Any]:
    value: dict[str, Any] = {"object": "cache.report", "days": reports.DAYS, **msgspec.to_builtins(report)}
    return value | {"saved_usd": format_amount(report.saved_nanousd)}
