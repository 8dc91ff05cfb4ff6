"""Say what answers of ``/v1/batches`` hold, for the OpenAPI document."""

from typing import Literal

from apps.gateway.shapes import CachedDetails, Shape


class BatchProblem(Shape):
    code: str
    line: int | None
    message: str
    param: str | None


class BatchProblems(Shape):
    object: Literal["list"]
    data: list[BatchProblem]


class BatchCounts(Shape):
    total: int
    completed: int
    failed: int


class BatchOutputDetails(Shape):
    reasoning_tokens: int


class BatchUsage(Shape):
    input_tokens: int
    input_tokens_details: CachedDetails
    output_tokens: int
    output_tokens_details: BatchOutputDetails
    total_tokens: int


class Batch(Shape):
    """A bulk job and how far it is. Times are epoch seconds."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchProblems | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    model: str | None
    """The one that all requests ask for."""
    usage: BatchUsage | None
    """What the requests that were answered until now used; null where their answers do not say it."""
    metadata: dict[str, str]


class BatchList(Shape):
    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool
