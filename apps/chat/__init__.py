"""Keep conversations, and stream answers to browsers over WebSockets.

Owns:        tables Conversation, Message and PersonalInstructions; the Redis channel of news between a person's pages
Enter at:    routing.websocket_application, urls, transcripts.run, departures.run, `manage.py settle`
May import:  apps.inference, apps.spend, apps.accounts, aiscale.*
Invariant:   a message is in Postgres before its answer is asked for; its answer is written once, by transcripts, however the
             browser, the web process or the worker came to an end; nobody sees another one's conversation;
             a message that is asked anew is kept, and no longer part of the talk, unless it is shown again;
             it is paid by the organization that it was begun in, as long as its user is a member
Hot path:    SQL to begin a turn, none for a token
If it fails: the page says why; a browser that comes back goes on where the answer is; without Redis, pages do not hear of each other
"""
