"""List everything that ``/v1`` answers."""

from apps.gateway.batches import answers as batches
from apps.gateway.chat_completions import answer_chat
from apps.gateway.chat_schema import ChatBody
from apps.gateway.embeddings import EmbeddingBody, answer_embeddings
from apps.gateway.files import answers as files
from apps.gateway.messages.creation import answer_count, answer_messages
from apps.gateway.messages.schema import CountBody, MessagesBody
from apps.gateway.model_list import answer_model, answer_models, refuse_model_deletion
from apps.gateway.responses.creation import answer_creation
from apps.gateway.responses.schema import ResponseBody
from apps.gateway.responses.stored import answer_cancellation, answer_deletion, answer_input_items, answer_stored
from apps.gateway.routes import Route, Router
from apps.gateway.text_completions import answer_text
from apps.gateway.text_schema import TextBody

ROUTER = Router(
    [
        Route(
            method="POST",
            path="/v1/chat/completions",
            answer=answer_chat,
            body="json",
            tag="Chat",
            summary="Answer a conversation",
            request=ChatBody,
        ),
        Route(
            method="POST",
            path="/v1/completions",
            answer=answer_text,
            body="json",
            tag="Completions",
            summary="Go on from a text",
            request=TextBody,
        ),
        Route(
            method="POST",
            path="/v1/embeddings",
            answer=answer_embeddings,
            body="json",
            tag="Embeddings",
            summary="Turn texts into vectors",
            request=EmbeddingBody,
        ),
        Route(
            method="POST",
            path="/v1/responses",
            answer=answer_creation,
            body="json",
            tag="Responses",
            summary="Make a response, and keep it to go on from",
            request=ResponseBody,
        ),
        Route(
            method="GET",
            path="/v1/responses/{response_id}",
            answer=answer_stored,
            tag="Responses",
            summary="Fetch a stored response",
        ),
        Route(
            method="DELETE",
            path="/v1/responses/{response_id}",
            answer=answer_deletion,
            tag="Responses",
            summary="Delete a stored response",
        ),
        Route(
            method="POST",
            path="/v1/responses/{response_id}/cancel",
            answer=answer_cancellation,
            tag="Responses",
            summary="Stop a background response",
        ),
        Route(
            method="GET",
            path="/v1/responses/{response_id}/input_items",
            answer=answer_input_items,
            tag="Responses",
            summary="List what was said to a response",
        ),
        Route(
            method="POST",
            path="/v1/messages",
            answer=answer_messages,
            body="json",
            tag="Messages",
            summary="Answer a conversation, in Anthropic's dialect",
            request=MessagesBody,
        ),
        Route(
            method="POST",
            path="/v1/messages/count_tokens",
            answer=answer_count,
            body="json",
            tag="Messages",
            summary="Count the tokens of a conversation",
            request=CountBody,
        ),
        Route(
            method="POST",
            path="/v1/files",
            answer=files.answer_upload,
            body="stream",
            tag="Files",
            summary="Upload a file",
        ),
        Route(method="GET", path="/v1/files", answer=files.answer_list, tag="Files", summary="List files"),
        Route(
            method="GET", path="/v1/files/{file_id}", answer=files.answer_file, tag="Files", summary="Describe a file"
        ),
        Route(
            method="GET",
            path="/v1/files/{file_id}/content",
            answer=files.answer_content,
            tag="Files",
            summary="Download a file",
        ),
        Route(
            method="DELETE",
            path="/v1/files/{file_id}",
            answer=files.answer_deletion,
            tag="Files",
            summary="Delete a file",
        ),
        Route(
            method="POST",
            path="/v1/batches",
            answer=batches.answer_creation,
            body="json",
            tag="Batches",
            summary="Run a file of requests at half price, within a day",
            request=batches.BatchBody,
        ),
        Route(method="GET", path="/v1/batches", answer=batches.answer_list, tag="Batches", summary="List batches"),
        Route(
            method="GET",
            path="/v1/batches/{batch_id}",
            answer=batches.answer_batch,
            tag="Batches",
            summary="Describe a batch with its progress",
        ),
        Route(
            method="POST",
            path="/v1/batches/{batch_id}/cancel",
            answer=batches.answer_cancellation,
            tag="Batches",
            summary="Start no more requests of a batch",
        ),
        Route(
            method="GET", path="/v1/models", answer=answer_models, tag="Models", summary="List the models you may use"
        ),
        Route(
            method="GET",
            path="/v1/models/{model:path}",
            answer=answer_model,
            tag="Models",
            summary="Describe one model",
        ),
        Route(
            method="DELETE",
            path="/v1/models/{model:path}",
            answer=refuse_model_deletion,
            tag="Models",
            summary="Refused: models are the administrator's",
        ),
    ]
)
