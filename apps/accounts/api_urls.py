"""Map ``/api/v1/organizations``."""

from django.urls import include, re_path

from apps.accounts import api

_organization = [
    re_path(r"^/?$", api.Organization.as_view(), name="api_organization"),
    re_path(r"^/transfer/?$", api.Transfer.as_view(), name="api_transfer"),
    re_path(r"^/members/?$", api.Members.as_view(), name="api_members"),
    re_path(r"^/members/(?P<member_id>[^/]+)/?$", api.Member.as_view(), name="api_member"),
    re_path(r"^/invitations/?$", api.Invitations.as_view(), name="api_invitations"),
    re_path(r"^/invitations/(?P<invitation_id>[^/]+)/?$", api.OneInvitation.as_view(), name="api_invitation"),
    re_path(r"^/invitations/(?P<invitation_id>[^/]+)/resend/?$", api.InvitationMail.as_view(), name="api_resend"),
    re_path(r"^/keys/?$", api.Keys.as_view(), name="api_keys"),
    re_path(r"^/keys/(?P<key_id>[^/]+)/?$", api.Key.as_view(), name="api_key"),
]

urlpatterns = [
    re_path(r"^organizations/?$", api.Organizations.as_view(), name="api_organizations"),
    re_path(r"^organizations/(?P<organization_id>[^/]+)", include(_organization)),
]
