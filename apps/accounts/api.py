"""Answer ``/api/v1/organizations`` and what is below: members, invitations and keys, for programs."""

from dataclasses import replace
from decimal import Decimal
from typing import Any

from django.db import transaction
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from aiscale.errors import AiscaleError, Code
from aiscale.listing import make_list, read_page
from apps.accounts import invitations, key_limits, keys, members, organizations, roles
from apps.accounts.api_access import check_manages, check_no_wider, read_access, read_actor, refuse_program
from apps.accounts.api_shapes import (
    MOST,
    DeletedShape,
    InvitationShape,
    KeyShape,
    MemberShape,
    NewKeyShape,
    OrganizationShape,
    document,
)
from apps.accounts.models import ApiKey, Invitation, User
from apps.accounts.rates import CREATE_KEY, CREATE_ORGANIZATION, INVITE, check_rate
from apps.accounts.roles import Right
from apps.accounts.serializers import (
    Body,
    InvitationBody,
    KeyBody,
    KeyChangeBody,
    OrganizationBody,
    OrganizationChangeBody,
    RoleBody,
    TransferBody,
    describe_deleted,
    describe_invitation,
    describe_key,
    describe_member,
    describe_organization,
)

PAGE = 20


class Organizations(APIView):
    @document("List your organizations", OrganizationShape, many=True)
    def get(self, request: Request) -> Response:
        """A key sees its own one alone."""
        user = _user(request)
        if isinstance(request.auth, ApiKey):
            access = read_access(request, request.auth.organization.public_id, Right.SEE_ORGANIZATION)
            places = [access.place]
        else:
            places = organizations.list_memberships(user)
        return Response(
            {"object": "list", "data": [describe_organization(place) for place in places], "has_more": False}
        )

    @document("Make an organization", OrganizationShape, body=OrganizationBody, status=201, errors="400 409")
    def post(self, request: Request) -> Response:
        """Not with a key: log in."""
        refuse_program(request)
        values = _read(OrganizationBody, request)
        check_rate(request._request, CREATE_ORGANIZATION)
        place = organizations.create(_user(request), values["name"], actor=read_actor(request))
        return Response(describe_organization(place), 201)


class Organization(APIView):
    @document("Show an organization", OrganizationShape)
    def get(self, request: Request, organization_id: str) -> Response:
        return Response(describe_organization(read_access(request, organization_id, Right.SEE_ORGANIZATION).place))

    @document("Change an organization", OrganizationShape, body=OrganizationChangeBody, errors="400 409")
    def patch(self, request: Request, organization_id: str) -> Response:
        """All that is named, or nothing. What is left out stays as it is."""
        access = read_access(request, organization_id, Right.RENAME)
        values = _read(OrganizationChangeBody, request)
        if not values:
            raise AiscaleError(Code.INVALID_REQUEST, "Name at least one thing to change, such as name.", param="name")
        percent = values.get("semantic_max_error_percent")
        with transaction.atomic():
            place, changed = access.place, access.organization
            if "name" in values:
                changed = organizations.rename(access.user, changed, values["name"], actor=access.actor)
            if "semantic_cache" in values or percent is not None:
                changed = organizations.set_semantic_cache(
                    access.user,
                    changed,
                    values.get("semantic_cache", changed.semantic_cache),
                    None if percent is None else Decimal(str(percent)),
                    actor=access.actor,
                )
            place.organization = changed
        return Response(describe_organization(place))

    @document("Delete an organization", DeletedShape, errors="400 409")
    def delete(self, request: Request, organization_id: str) -> Response:
        """For all its members; not with a key."""
        access = read_access(request, organization_id, Right.DELETE)
        refuse_program(request)
        organizations.delete(access.user, access.organization, actor=access.actor)
        return Response(describe_deleted("organization", organization_id))


class Transfer(APIView):
    @document("Hand an organization over", MemberShape, body=TransferBody, errors="400 409")
    def post(self, request: Request, organization_id: str) -> Response:
        """The member becomes an owner, and you an admin; not with a key."""
        access = read_access(request, organization_id, Right.TRANSFER)
        refuse_program(request)
        member_id = _read(TransferBody, request)["member_id"]
        return Response(
            describe_member(members.transfer(access.user, access.organization, member_id, actor=access.actor))
        )


class Members(APIView):
    @document("List members", MemberShape, many=True)
    def get(self, request: Request, organization_id: str) -> Response:
        access = read_access(request, organization_id, Right.SEE_MEMBERS)
        rows = access.organization.memberships.select_related("user")
        return Response(make_list(rows, _page(request), describe_member))


class Member(APIView):
    @document("Show a member", MemberShape)
    def get(self, request: Request, organization_id: str, member_id: str) -> Response:
        access = read_access(request, organization_id, Right.SEE_MEMBERS)
        return Response(describe_member(members.get_member(access.organization, member_id)))

    @document("Change a member's role", MemberShape, body=RoleBody, errors="400 409")
    def patch(self, request: Request, organization_id: str, member_id: str) -> Response:
        access = read_access(request, organization_id, Right.CHANGE_ROLES)
        role = _read(RoleBody, request)["role"]
        changed = members.change_role(access.user, access.organization, member_id, role, actor=access.actor)
        return Response(describe_member(changed))

    @document("Remove a member, or leave", DeletedShape, errors="400 409")
    def delete(self, request: Request, organization_id: str, member_id: str) -> Response:
        """Their keys of this organization are refused from then on. With your own id you leave."""
        access = read_access(request, organization_id, Right.SEE_MEMBERS)
        if member_id == access.place.public_id:
            members.leave(access.user, access.organization, actor=access.actor)
        else:
            roles.check(access.place.role, Right.REMOVE_MEMBERS)
            members.remove(access.user, access.organization, member_id, actor=access.actor)
        return Response(describe_deleted("organization.member", member_id))


class Invitations(APIView):
    @document("List invitations that wait", InvitationShape, many=True)
    def get(self, request: Request, organization_id: str) -> Response:
        access = read_access(request, organization_id, Right.INVITE)
        rows = access.organization.invitations.filter(state=Invitation.State.PENDING).select_related("invited_by")
        return Response(make_list(rows, _page(request), describe_invitation))

    @document("Invite somebody", InvitationShape, body=InvitationBody, status=201, errors="400 409")
    def post(self, request: Request, organization_id: str) -> Response:
        """An address that is invited already is sent the mail again."""
        access = read_access(request, organization_id, Right.INVITE)
        values = _read(InvitationBody, request)
        check_rate(request._request, INVITE)
        made = invitations.invite(access.user, access.organization, values["email"], values["role"], actor=access.actor)
        return Response(describe_invitation(made), 201)


class InvitationMail(APIView):
    @document("Send an invitation's mail again", InvitationShape)
    def post(self, request: Request, organization_id: str, invitation_id: str) -> Response:
        """It then works for another seven days."""
        access = read_access(request, organization_id, Right.INVITE)
        check_rate(request._request, INVITE)
        sent = invitations.resend(access.user, access.organization, invitation_id, actor=access.actor)
        return Response(describe_invitation(sent))


class OneInvitation(APIView):
    @document("Take an invitation back", DeletedShape)
    def delete(self, request: Request, organization_id: str, invitation_id: str) -> Response:
        access = read_access(request, organization_id, Right.INVITE)
        invitations.revoke(access.user, access.organization, invitation_id, actor=access.actor)
        return Response(describe_deleted("organization.invitation", invitation_id))


class Keys(APIView):
    @document("List keys", KeyShape, many=True)
    def get(self, request: Request, organization_id: str) -> Response:
        """Your own; owners and admins see all of the organization's."""
        access = read_access(request, organization_id, Right.SEE_ORGANIZATION)
        check_manages(access.key)
        return Response(make_list(keys.list_visible(access.place), _page(request), describe_key, key_limits.attach))

    @document("Make a key", NewKeyShape, body=KeyBody, status=201, errors="400 409")
    def post(self, request: Request, organization_id: str) -> Response:
        """The answer holds the key itself in ``value``: it is nowhere else."""
        access = read_access(request, organization_id, Right.MAKE_OWN_KEYS)
        body = KeyBody(data=request.data)
        body.is_valid(raise_exception=True)
        terms = body.make_terms()
        if access.key is not None:
            check_no_wider(access.key, terms)
        check_rate(request._request, CREATE_KEY)
        name = body.validated_data["name"]
        key, raw = keys.create_member_key(access.organization, access.user, name, terms, by=access.actor)
        key_limits.attach([key])
        return Response(describe_key(key, raw), 201)


class Key(APIView):
    @document("Show a key", KeyShape)
    def get(self, request: Request, organization_id: str, key_id: str) -> Response:
        return Response(describe_key(_find_key(request, organization_id, key_id)[0]))

    @document("Change a key", KeyShape, body=KeyChangeBody)
    def patch(self, request: Request, organization_id: str, key_id: str) -> Response:
        """For owners and admins. What is left out stays as it is; null takes a limit away. In force within a second."""
        access = read_access(request, organization_id, Right.SEE_ORGANIZATION)
        key, actor = _find_key(request, organization_id, key_id)
        roles.check(access.place.role, Right.CHANGE_KEYS)
        body = KeyChangeBody(data=request.data)
        body.is_valid(raise_exception=True)
        changes = body.read_changes()
        if not changes:
            raise AiscaleError(Code.INVALID_REQUEST, "Name at least one thing to change, such as name.", param="name")
        if access.key is not None:
            wanted = {name: value for name, value in changes.items() if name != "name"}
            check_no_wider(access.key, replace(keys.read_terms(key), can_manage=False, **wanted))
        key = keys.change_key(access.place, key, changes, by=actor)
        key_limits.attach([key])
        return Response(describe_key(key))

    @document("Revoke a key", KeyShape)
    def delete(self, request: Request, organization_id: str, key_id: str) -> Response:
        """It is refused from then on, and what it has running ends within a second."""
        key, actor = _find_key(request, organization_id, key_id)
        keys.revoke_key(key, actor)
        key.refresh_from_db()
        key_limits.attach([key])
        return Response(describe_key(key))


def _find_key(request: Request, organization_id: str, key_id: str) -> tuple[ApiKey, Any]:
    access = read_access(request, organization_id, Right.SEE_ORGANIZATION)
    check_manages(access.key)
    key = keys.find_visible(access.place, key_id)
    if key is None:
        raise AiscaleError(Code.NOT_FOUND, "This key does not exist.", param="key_id")
    key_limits.attach([key])
    return key, access.actor


def _user(request: Request) -> User:
    assert isinstance(request.user, User)
    return request.user


def _read(kind: type[Body], request: Request) -> dict[str, Any]:
    body = kind(data=request.data)
    body.is_valid(raise_exception=True)
    values: dict[str, Any] = body.validated_data
    return values


def _page(request: Request) -> Any:
    return read_page(request.query_params.dict(), most=MOST, default=PAGE)
