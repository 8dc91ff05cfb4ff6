"""Keep files for callers: what a batch reads, and what it writes.

Owns:        table StoredFile; the storage named ``files`` in Django's settings
Enter at:    answers.answer_upload and its neighbours; keeping.keep, open_file, delete; upkeep.tidy
May import:  apps.gateway's exchange and parameters; apps.accounts, aiscale.errors, db
Invariant:   a row stands before its bytes are stored and goes after they are deleted, so no bytes are without an owner; an
             organization's files never pass its quota; another organization's file does not exist
Hot path:    an upload goes to disk piece by piece, never to memory; three SQL transactions
If it fails: a half-made or half-deleted file is not shown, and `upkeep.tidy` takes it away
"""
