"""Tie the house together: settings, entry points, and what every package may import.

Owns:        no tables; the embedded stack's data directory
Enter at:    asgi.application, celery.app, urls, manage.py's commands up, tour
May import:  env, errors, observability, wire, redis and db import nothing above them; asgi, urls and embedded import all
Invariant:   imports point down; the web never loads a model, the workers never see the database
Hot path:    asgi routes /v1 before Django; no SQL and no Redis of its own
If it fails: a bad setting ends the process with one line that names it; `up` restarts a child that dies
"""
