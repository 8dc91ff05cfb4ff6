"""Change what developing needs: error pages, and static files read from disk at every request."""

from aiscale.settings.base import *  # noqa: F403

DEBUG = True
SERVESTATIC_AUTOREFRESH = True
