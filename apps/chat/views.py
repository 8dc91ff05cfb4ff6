"""Show the chat's pages. Everything that moves in them comes over the WebSocket."""

from typing import Any, Literal

from asgiref.sync import async_to_sync
from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.core.paginator import Paginator
from django.db import transaction
from django.db.models import Q
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST

from aiscale.errors import AiscaleError
from apps.accounts import active_organization, callers, roles
from apps.accounts.models import User
from apps.accounts.roles import Right
from apps.chat import exports, instructions, markdown, news, versions
from apps.chat.models import Conversation, Message
from apps.chat.news import News
from apps.chat.turns import MAX_TEXT_CHARS, TITLE_CHARS
from apps.inference.models import Model
from apps.spend import usage
from apps.spend.templatetags.money import usd_cents

SIDEBAR = 40
PAGE = 60
MESSAGES = 80


@never_cache
@require_http_methods(["GET", "HEAD"])
def show_home(request: HttpRequest) -> HttpResponse:
    """Show a new conversation, or the landing page to those who are not logged in."""
    if not request.user.is_authenticated:
        # what is written to such a model leaves this server
        has_upstreams = Model.objects.filter(is_enabled=True, upstream__isnull=False).exists()
        return render(request, "chat/landing.html", {"has_upstreams": has_upstreams})
    return render(request, "chat/chat.html", _chat_context(request, None))


@login_required
@never_cache
@require_http_methods(["GET", "HEAD"])
def show_conversation(request: HttpRequest, conversation_id: str) -> HttpResponse:
    """Show one of the user's own conversations, its last messages or those before ``?before=``. Its organization becomes the active one."""
    conversation = _get_own(request, conversation_id)
    active_organization.switch_to(request, conversation.organization_id)
    return render(request, "chat/chat.html", _chat_context(request, conversation))


@login_required
@never_cache
@require_http_methods(["GET", "HEAD"])
def list_conversations(request: HttpRequest) -> HttpResponse:
    """List the user's conversations in the active organization, a page at a time: all, or those in which ``?q=`` was said."""
    active = active_organization.get_active(request)
    found = Conversation.objects.list_of(_user(request).pk).filter(organization=active.organization_id)
    words = request.GET.get("q", "").replace("\x00", "").strip()[:200]
    if words:
        said = Message.objects.filter(conversation__user=_user(request), content__icontains=words, replaced_by=None)
        found = found.filter(Q(title__icontains=words) | Q(pk__in=said.values("conversation_id")))
    page = Paginator(found, PAGE).get_page(request.GET.get("page"))
    return render(request, "chat/list.html", {"page": page, "words": words})


@login_required
@never_cache
@require_http_methods(["GET", "HEAD"])
def export(request: HttpRequest, conversation_id: str) -> HttpResponseBase:
    """Hand a conversation over as a file: ``?format=markdown`` or ``json``."""
    conversation = _get_own(request, conversation_id)
    write, content_type, ending = exports.FORMATS.get(request.GET.get("format", ""), exports.FORMATS["markdown"])
    response = StreamingHttpResponse(write(conversation), content_type=content_type)
    response["Content-Disposition"] = f'attachment; filename="{conversation.public_id}.{ending}"'
    return response


@login_required
@require_POST
def rename(request: HttpRequest, conversation_id: str) -> HttpResponse:
    conversation = _get_own(request, conversation_id)
    title = " ".join(request.POST.get("title", "").replace("\x00", "").split())[:120]
    if title:
        conversation.title = title
        conversation.save(update_fields=["title", "updated_at"])
        _tell_pages(request, "renamed", conversation)
    else:
        messages.error(request, "A conversation needs a name.")
    return _go_back(request) or redirect("chat:conversation", conversation.public_id)


@login_required
@require_POST
def delete(request: HttpRequest, conversation_id: str) -> HttpResponse:
    """Delete a conversation: what was said is gone at once."""
    with transaction.atomic():
        # locked before its messages are, as whoever writes in it does
        own = Conversation.objects.select_for_update(of=("self",)).list_of(_user(request).pk)
        conversation = get_object_or_404(own, public_id=conversation_id.replace("\x00", ""))
        conversation.messages.all().delete()
        conversation.title, conversation.deleted_at = "", timezone.now()
        conversation.save(update_fields=["title", "deleted_at", "updated_at"])
    _tell_pages(request, "deleted", conversation)
    messages.success(request, "The conversation is deleted.")
    back = _go_back(request)
    return redirect("chat:home") if back is None or conversation.public_id in request.POST["next"] else back


@login_required
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def edit_instructions(request: HttpRequest) -> HttpResponse:
    """Show what the user wants all chats to heed, and keep another text."""
    user, error = _user(request), ""
    text = request.POST.get("text", "") if request.method == "POST" else instructions.read(user.public_id)
    if request.method == "POST":
        try:
            instructions.save(user, text)
        except AiscaleError as refusal:
            error = refusal.message
        else:
            messages.success(request, "Saved. Your chats heed it from the next question on.")
            return redirect("chat:instructions")
    context = {"text": text, "error": error, "max_chars": instructions.MAX_CHARS}
    return render(request, "chat/instructions.html", context)


def _tell_pages(request: HttpRequest, kind: Literal["renamed", "deleted"], conversation: Conversation) -> None:
    user_id, conversation_id = _user(request).public_id, conversation.public_id
    news.tell_from_thread(News(kind=kind, user_id=user_id, conversation_id=conversation_id))


def _go_back(request: HttpRequest) -> HttpResponse | None:
    """Return to the page that the form was sent from, where it says so."""
    place = request.POST.get("next", "")
    return redirect(place) if url_has_allowed_host_and_scheme(place, {request.get_host()}) else None


def _user(request: HttpRequest) -> User:
    assert isinstance(request.user, User)
    return request.user


def _get_own(request: HttpRequest, conversation_id: str) -> Conversation:
    """Return a conversation of this user's. Another one's does not exist."""
    own = Conversation.objects.list_of(_user(request).pk)
    return get_object_or_404(own, public_id=conversation_id.replace("\x00", ""))


def _chat_context(request: HttpRequest, conversation: Conversation | None) -> dict[str, Any]:
    active = active_organization.get_active(request)
    organization = active.organization
    own = Conversation.objects.list_of(active.user_id).filter(organization=organization)
    sidebar = list(own[: SIDEBAR + 1])
    models = _list_models(organization.plan.slug)
    chosen = conversation.model if conversation else ""
    if chosen not in {model.slug for model in models}:
        chosen = models[0].slug if models else ""
    rows, earlier = _read_messages(request, conversation)
    summary = usage.month_summary(organization.public_id)
    # below zero is credit, on top of the limit: the page of usage tells it
    limit, spent = summary.limit_nanousd, max(summary.spent_nanousd, 0)
    return {
        "conversation": conversation,
        "rows": rows,
        "earlier": earlier,
        "is_earlier": conversation is not None and _read_before(request) is not None,
        "sidebar": sidebar[:SIDEBAR],
        "has_more": len(sidebar) > SIDEBAR,
        "models": models,
        "chosen": chosen,
        "plan": organization.plan,
        "may_chat": roles.may(active.role, Right.CHAT),
        "spent": usd_cents(spent),
        "limit": usd_cents(limit),
        "spent_percent": min(spent * 100 // limit, 100) if limit else 100,
        "title_chars": TITLE_CHARS,
        "max_chars": MAX_TEXT_CHARS,
    }


def _list_models(plan_slug: str) -> list[Model]:
    plan = async_to_sync(callers.get_plan)(plan_slug)
    enabled = Model.objects.filter(is_enabled=True, kind=Model.Kind.GENERATE).order_by("name")
    return [model for model in enabled if plan.allows(model.slug)]


def _read_messages(request: HttpRequest, conversation: Conversation | None) -> tuple[list[dict[str, Any]], int | None]:
    """Return the messages to show, and the position before which there are more."""
    if conversation is None:
        return [], None
    found = conversation.messages.filter(replaced_by=None).order_by("-position")
    before = _read_before(request)
    if before is not None:
        found = found.filter(position__lt=before)
    rows = list(found[: MESSAGES + 1])
    shown = rows[:MESSAGES][::-1]
    earlier = shown[0].position if len(rows) > MESSAGES else None
    several = versions.list_versions(conversation.public_id)
    return [_describe(row) | {"versions": several.get(row.public_id, ())} for row in shown], earlier


def _read_before(request: HttpRequest) -> int | None:
    before = request.GET.get("before", "")
    return int(before) if before.isascii() and before.isdigit() and len(before) < 9 else None


def _describe(row: Message) -> dict[str, Any]:
    is_answer = row.role == Message.Role.ASSISTANT
    return {
        "id": row.public_id,
        "role": row.role,
        "status": row.status,
        "text": row.content,
        "html": markdown.render(row.content) if is_answer else "",
        "error_code": row.error_code,
        "error_message": row.error_message,
    }
