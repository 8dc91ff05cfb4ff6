"""Speak OpenAI's Responses API: create, stream, keep, continue, find, cancel and delete responses of text.

Owns:        table StoredResponse
Enter at:    creation.answer_creation, stored.answer_stored and its neighbours, upkeep.finish_lost, upkeep.forget_expired
May import:  apps.gateway's exchange, parameters and streaming; apps.inference, apps.accounts, aiscale.errors, db, wire
Invariant:   a response that is to be stored has its row before its first event is sent; another organization's does not exist
Hot path:    as a chat completion; a stored one costs two SQL statements more, a continued one two to read what was said
If it fails: a web process that dies leaves the row in progress; its job's log tells how it ended, and `upkeep` writes it down
"""
