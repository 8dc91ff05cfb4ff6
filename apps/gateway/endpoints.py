"""List everything that ``/v1`` answers."""

from apps.gateway.chat_completions import answer_chat
from apps.gateway.chat_schema import ChatBody
from apps.gateway.embeddings import EmbeddingBody, answer_embeddings
from apps.gateway.model_list import answer_model, answer_models, refuse_model_deletion
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
