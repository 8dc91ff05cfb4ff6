"""Say what answers of ``/v1/messages/batches`` hold, for the OpenAPI document."""

from typing import Literal

from apps.gateway.shapes import Shape


class MessageBatchCounts(Shape):
    processing: int
    succeeded: int
    errored: int
    canceled: int
    expired: int


class MessageBatch(Shape):
    """A bulk job in Anthropic's dialect."""

    id: str
    type: Literal["message_batch"]
    processing_status: Literal["in_progress", "canceling", "ended"]
    request_counts: MessageBatchCounts
    created_at: str
    expires_at: str
    cancel_initiated_at: str | None
    ended_at: str | None
    archived_at: None
    results_url: str | None


class MessageBatchList(Shape):
    data: list[MessageBatch]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedMessageBatch(Shape):
    id: str
    type: Literal["message_batch_deleted"]
