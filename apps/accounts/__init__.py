"""Know who somebody is: users, organizations, plans and API keys.

Owns:        tables User, Organization, Membership, Invitation, Plan, ApiKey, AuditEvent; Redis key families key, org and plan
Enter at:    callers.get_by_key, get_by_user, get_plan; keys.create_key, change_key, revoke_key; organizations.create and delete;
             members.remove, leave and transfer; invitations.invite and accept; roles.check; active_organization.get_active;
             audit.record; addresses.client_address; personal_data.iter_export and delete_account
May import:  aiscale.redis, db, wire, errors, observability
Invariant:   a raw key is never stored; every user has one personal organization; no organization is without an owner; who is
             no member of an organization cannot tell that it exists; Redis says what Postgres said last
Hot path:    one Redis trip for a key that Redis knows; SQL only to refill what it has lost
If it fails: no Redis: 503. A change that could not be mirrored is in Postgres, and the next publish_all brings it over.
             A mail that could not be sent is due again
"""
