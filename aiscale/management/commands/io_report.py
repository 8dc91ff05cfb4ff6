"""Print what each of the main paths costs in SQL statements and Redis trips."""

import asyncio
import json
from pathlib import Path
from typing import Any

from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.contrib.sessions.backends.cached_db import SessionStore
from django.core.management.base import BaseCommand, CommandError, CommandParser

from aiscale import io_counts

BASELINE = Path(__file__).resolve().parents[3] / "tests" / "baselines" / "io_counts.json"


class Command(BaseCommand):
    help = (
        "Walk the main paths in this process, against the servers and a worker that run (make up), and count their SQL statements and "
        "Redis trips. A few requests are made, and charged, in the name of --email. With --write the baseline is replaced."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--email", default="admin@localhost")
        parser.add_argument("--write", action="store_true")

    def handle(self, *args: Any, email: str, write: bool, **options: Any) -> None:
        from apps.accounts.keys import create_key, revoke_key
        from apps.accounts.models import User
        from apps.accounts.organizations import ensure_personal_organization

        user = User.objects.filter(email__iexact=email, is_active=True).first()
        if user is None:
            raise CommandError(f"No user has the e-mail address {email}. Name one with --email.")
        key, raw = create_key(ensure_personal_organization(user), user, "io_report")
        session = make_session(user)
        try:
            counts = asyncio.run(io_counts.measure(raw, session))
        finally:
            SessionStore(session).delete()
            revoke_key(key)
        before = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
        for line in describe(counts, before):
            self.stdout.write(line)
        if write:
            BASELINE.parent.mkdir(exist_ok=True)
            BASELINE.write_text(json.dumps(counts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_session(user: Any) -> str:
    """Log a user in, and return the session's key. I/O: SQL and Redis."""
    session = SessionStore()
    session[SESSION_KEY] = str(user.pk)
    session[BACKEND_SESSION_KEY] = "django.contrib.auth.backends.ModelBackend"
    session[HASH_SESSION_KEY] = user.get_session_auth_hash()
    session.save()
    return str(session.session_key)


def describe(counts: dict[str, io_counts.Counts], before: dict[str, io_counts.Counts]) -> list[str]:
    """Write the counts of each path, and what is not as it was."""
    lines = []
    for path, now in counts.items():
        lines.append(f"{path}: {len(now['sql'])} SQL statements, {len(now['redis'])} Redis trips")
        for kind in ("sql", "redis"):
            lines += [f"    {name}" for name in now[kind]]
        if path in before and before[path] != now:
            was = before[path]
            lines.append(f"    differs from the baseline: {len(was['sql'])} and {len(was['redis'])}")
    return lines
