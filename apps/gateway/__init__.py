"""Speak other people's dialects over HTTP: OpenAI's first.

Owns:        the tables of models.py, each written by the part that its docstring names; no keys
Enter at:    asgi.GatewayApplication, which answers /v1 before Django
May import:  apps.inference, apps.spend, apps.accounts, aiscale.errors, db, wire
Invariant:   every answer has a request id; every error has the shape of its dialect; a parameter is honoured or refused by name
Hot path:    one Redis trip to know the key, then those of apps.inference; no SQL once caches are warm, but for what is to be kept
If it fails: the caller reads a named reason; a caller that leaves cancels its job
"""
