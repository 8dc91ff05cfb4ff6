#!/usr/bin/env python3
"""Run aiscale's commands. ``python manage.py help`` lists them."""

import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "aiscale.settings.base")
    try:
        from django.core.management import execute_from_command_line

        execute_from_command_line(sys.argv)
    except KeyboardInterrupt:
        # Ctrl-C is no fault that a trace would help to find; `up` stops in order where it has begun
        sys.exit("aiscale: stopped")


if __name__ == "__main__":
    main()
