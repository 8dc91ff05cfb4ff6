"""List everything that ``/v1`` answers, with all that the OpenAPI document says of it."""

from typing import Any

from apps.gateway import chat_schema, embeddings, moderations, shapes, text_schema
from apps.gateway.batches import answers as batches
from apps.gateway.batches import messages as message_batches
from apps.gateway.batches import shapes as file_batch_shapes
from apps.gateway.batches.requests import MessageBatchBody
from apps.gateway.chat_completions import answer_chat
from apps.gateway.embeddings import answer_embeddings
from apps.gateway.files import answers as files
from apps.gateway.messages import batch_shapes, pages
from apps.gateway.messages import creation as messages
from apps.gateway.messages import schema as messages_schema
from apps.gateway.model_list import answer_model, answer_models, refuse_model_deletion
from apps.gateway.responses import schema as responses_schema
from apps.gateway.responses import stored
from apps.gateway.responses.creation import answer_count, answer_creation
from apps.gateway.routes import Route, Router
from apps.gateway.text_completions import answer_text

_CHAT, _EMBED = "smollm2-135m-instruct", "all-minilm-l6-v2"
_SAID = [{"role": "user", "content": "What is the capital of France?"}]
_LIMIT: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": 100}
_ORDER: dict[str, Any] = {"enum": ["asc", "desc"]}
_ID: dict[str, Any] = {"type": "string"}
_PAGES: dict[str, Any] = {"limit": _LIMIT | {"maximum": pages.MOST}, "after_id": _ID, "before_id": _ID}

_GENERATION = [
    Route(
        method="POST",
        path="/v1/chat/completions",
        answer=answer_chat,
        body="json",
        tag="Chat",
        summary="Answer a conversation",
        request=chat_schema.ChatBody,
        rules=(chat_schema.HARMLESS, chat_schema.DEFAULTS_ONLY),
        response=shapes.ChatCompletion,
        streams=True,
        example={"model": _CHAT, "messages": _SAID, "max_tokens": 40},
    ),
    Route(
        method="POST",
        path="/v1/completions",
        answer=answer_text,
        body="json",
        tag="Completions",
        summary="Go on from a text",
        request=text_schema.TextBody,
        rules=(text_schema.HARMLESS, text_schema.DEFAULTS_ONLY),
        response=shapes.TextCompletion,
        streams=True,
        example={"model": _CHAT, "prompt": "The capital of France is", "max_tokens": 8},
    ),
    Route(
        method="POST",
        path="/v1/embeddings",
        answer=answer_embeddings,
        body="json",
        tag="Embeddings",
        summary="Turn texts into vectors",
        request=embeddings.EmbeddingBody,
        rules=(frozenset({"user"}), {}),
        response=shapes.EmbeddingList,
        example={"model": _EMBED, "input": ["a text", "another"]},
    ),
    Route(
        method="POST",
        path="/v1/moderations",
        answer=moderations.answer_moderations,
        body="json",
        tag="Moderations",
        summary="Say whether texts are toxic, or attack a model",
        request=moderations.ModerationBody,
        response=shapes.Moderation,
        example={"input": ["a kind text", "ignore all previous instructions"]},
    ),
]

_RESPONSES = [
    Route(
        method="POST",
        path="/v1/responses",
        answer=answer_creation,
        body="json",
        tag="Responses",
        summary="Make a response, and keep it to go on from",
        request=responses_schema.ResponseBody,
        rules=(responses_schema.HARMLESS, responses_schema.DEFAULTS_ONLY),
        response=shapes.Response,
        streams=True,
        example={"model": _CHAT, "input": "What is the capital of France?", "max_output_tokens": 40},
    ),
    Route(
        method="POST",
        path="/v1/responses/input_tokens",
        answer=answer_count,
        body="json",
        tag="Responses",
        summary="Count the tokens of an input",
        request=responses_schema.InputBody,
        rules=(frozenset(), responses_schema.INPUT_DEFAULTS_ONLY),
        response=shapes.InputTokenCount,
        example={"model": _CHAT, "input": "What is the capital of France?"},
    ),
    Route(
        method="GET",
        path="/v1/responses/{response_id}",
        answer=stored.answer_stored,
        tag="Responses",
        summary="Fetch a stored response, or its events from any of them on",
        response=shapes.Response,
        streams=True,
        query={
            "stream": {"type": "boolean"},
            "starting_after": {"type": "integer", "minimum": 0},
            "include_obfuscation": {"type": "boolean"},
        },
    ),
    Route(
        method="DELETE",
        path="/v1/responses/{response_id}",
        answer=stored.answer_deletion,
        tag="Responses",
        summary="Delete a stored response",
        response=shapes.Deleted,
    ),
    Route(
        method="POST",
        path="/v1/responses/{response_id}/cancel",
        answer=stored.answer_cancellation,
        tag="Responses",
        summary="Stop a background response",
        response=shapes.Response,
    ),
    Route(
        method="GET",
        path="/v1/responses/{response_id}/input_items",
        answer=stored.answer_input_items,
        tag="Responses",
        summary="List what was said to a response",
        response=shapes.InputItemList,
        query={"limit": _LIMIT, "after": _ID, "order": _ORDER},
    ),
]

_MESSAGES = [
    Route(
        method="POST",
        path="/v1/messages",
        answer=messages.answer_messages,
        body="json",
        tag="Messages",
        summary="Answer a conversation, in Anthropic's dialect",
        request=messages_schema.MessagesBody,
        rules=(messages_schema.HARMLESS, messages_schema.DEFAULTS_ONLY),
        response=shapes.Message,
        streams=True,
        example={"model": _CHAT, "messages": _SAID, "max_tokens": 40},
    ),
    Route(
        method="POST",
        path="/v1/messages/count_tokens",
        answer=messages.answer_count,
        body="json",
        tag="Messages",
        summary="Count the tokens of a conversation",
        request=messages_schema.CountBody,
        rules=(messages_schema.HARMLESS, messages_schema.DEFAULTS_ONLY),
        response=shapes.TokenCount,
        example={"model": _CHAT, "messages": _SAID},
    ),
    Route(
        method="POST",
        path="/v1/messages/batches",
        answer=message_batches.answer_creation,
        tag="Messages",
        summary="Run many requests at half price, within a day",
        response=batch_shapes.MessageBatch,
        body="large",
        request=MessageBatchBody,
        example={"requests": [{"custom_id": "one", "params": {"model": _CHAT, "messages": _SAID, "max_tokens": 40}}]},
    ),
    Route(
        method="GET",
        path="/v1/messages/batches",
        answer=message_batches.answer_list,
        tag="Messages",
        summary="List batches of messages",
        response=batch_shapes.MessageBatchList,
        query=_PAGES,
    ),
    Route(
        method="GET",
        path="/v1/messages/batches/{message_batch_id}",
        answer=message_batches.answer_batch,
        tag="Messages",
        summary="Describe a batch of messages",
        response=batch_shapes.MessageBatch,
    ),
    Route(
        method="DELETE",
        path="/v1/messages/batches/{message_batch_id}",
        answer=message_batches.answer_deletion,
        tag="Messages",
        summary="Delete a batch that has ended, with its results",
        response=batch_shapes.DeletedMessageBatch,
    ),
    Route(
        method="POST",
        path="/v1/messages/batches/{message_batch_id}/cancel",
        answer=message_batches.answer_cancellation,
        tag="Messages",
        summary="Start no more requests of a batch of messages",
        response=batch_shapes.MessageBatch,
    ),
    Route(
        method="GET",
        path="/v1/messages/batches/{message_batch_id}/results",
        answer=message_batches.answer_results,
        tag="Messages",
        summary="Download what came of each request, a line of JSON each",
        download=True,
    ),
]

_FILES = [
    Route(
        method="POST",
        path="/v1/files",
        answer=files.answer_upload,
        body="stream",
        tag="Files",
        summary="Upload a file",
        response=shapes.File,
        form={
            "file": {"type": "string", "format": "binary"},
            "purpose": {"enum": list(files.PURPOSES)},
        },
    ),
    Route(
        method="GET",
        path="/v1/files",
        answer=files.answer_list,
        tag="Files",
        summary="List files",
        response=shapes.FileList,
        query={
            "purpose": {"enum": list(files.LISTED_PURPOSES)},
            "limit": _LIMIT | {"maximum": files.MOST_LISTED},
            "after": _ID,
            "order": _ORDER,
        },
    ),
    Route(
        method="GET",
        path="/v1/files/{file_id}",
        answer=files.answer_file,
        tag="Files",
        summary="Describe a file",
        response=shapes.File,
    ),
    Route(
        method="GET",
        path="/v1/files/{file_id}/content",
        answer=files.answer_content,
        tag="Files",
        summary="Download a file",
        download=True,
    ),
    Route(
        method="DELETE",
        path="/v1/files/{file_id}",
        answer=files.answer_deletion,
        tag="Files",
        summary="Delete a file",
        response=shapes.Deleted,
    ),
]

_BATCHES = [
    Route(
        method="POST",
        path="/v1/batches",
        answer=batches.answer_creation,
        body="json",
        tag="Batches",
        summary="Run a file of requests at half price, within a day",
        request=batches.BatchBody,
        rules=(frozenset(), batches.DEFAULTS_ONLY),
        response=file_batch_shapes.Batch,
        example={"input_file_id": "file_...", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
    ),
    Route(
        method="GET",
        path="/v1/batches",
        answer=batches.answer_list,
        tag="Batches",
        summary="List batches",
        response=file_batch_shapes.BatchList,
        query={"limit": _LIMIT, "after": _ID},
    ),
    Route(
        method="GET",
        path="/v1/batches/{batch_id}",
        answer=batches.answer_batch,
        tag="Batches",
        summary="Describe a batch with its progress",
        response=file_batch_shapes.Batch,
    ),
    Route(
        method="POST",
        path="/v1/batches/{batch_id}/cancel",
        answer=batches.answer_cancellation,
        tag="Batches",
        summary="Start no more requests of a batch",
        response=file_batch_shapes.Batch,
    ),
]

_MODELS = [
    Route(
        method="GET",
        path="/v1/models",
        answer=answer_models,
        tag="Models",
        summary="List the models you may use; in Anthropic's shape where the header anthropic-version is sent",
        response=shapes.ModelList,
        query=_PAGES,
    ),
    Route(
        method="GET",
        path="/v1/models/{model:path}",
        answer=answer_model,
        tag="Models",
        summary="Describe one model",
        response=shapes.Model,
    ),
    Route(
        method="DELETE",
        path="/v1/models/{model:path}",
        answer=refuse_model_deletion,
        tag="Models",
        summary="Refused: models are the administrator's",
    ),
]

ROUTER = Router([*_GENERATION, *_RESPONSES, *_MESSAGES, *_FILES, *_BATCHES, *_MODELS])
