"""Map ``/account/``: what allauth does not bring."""

from django.urls import include, path

from apps.accounts import account_views, invitation_views, key_views, organization_views

app_name = "accounts"

_organization = [
    path("", organization_views.show_organization, name="organization"),
    path("semantic-cache/", organization_views.set_semantic_cache, name="semantic_cache"),
    path("switch/", organization_views.switch, name="switch"),
    path("leave/", organization_views.leave, name="leave"),
    path("delete/", organization_views.delete, name="delete_organization"),
    path("members/", organization_views.show_members, name="members"),
    path("members/<str:member_id>/role/", organization_views.change_role, name="change_role"),
    path("members/<str:member_id>/remove/", organization_views.remove_member, name="remove_member"),
    path("members/<str:member_id>/transfer/", organization_views.transfer, name="transfer"),
    path("invitations/", organization_views.invite, name="invite"),
    path("invitations/<str:invitation_id>/resend/", organization_views.resend_invitation, name="resend_invitation"),
    path("invitations/<str:invitation_id>/revoke/", organization_views.revoke_invitation, name="revoke_invitation"),
]

urlpatterns = [
    path("", account_views.show_account, name="account"),
    path("export/", account_views.export, name="export"),
    path("delete/", account_views.delete, name="delete_account"),
    path("keys/", key_views.show_keys, name="keys"),
    path("keys/<str:key_id>/", key_views.change, name="change_key"),
    path("keys/<str:key_id>/revoke/", key_views.revoke, name="revoke_key"),
    path("organizations/", organization_views.show_organizations, name="organizations"),
    path("organizations/<str:organization_id>/", include(_organization)),
    path("invitations/<str:token>/", invitation_views.show_invitation, name="invitation"),
]
