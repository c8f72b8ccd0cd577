"""The verbs of the command line as requests: what each takes, who may ask for it, and the words that it becomes."""

from __future__ import annotations

from vmsnap.agent.api.of_backups import OF_BACKUPS
from vmsnap.agent.api.of_hosts import OF_HOSTS
from vmsnap.agent.api.of_repositories import OF_REPOSITORIES
from vmsnap.agent.api.request import Request

VERBS: tuple[type[Request], ...] = (*OF_BACKUPS, *OF_REPOSITORIES, *OF_HOSTS)
"""All verbs that can be asked for. What would make a new passphrase travel (``key add``, ``key change``) is not among
them; ``list``, ``show``, ``vm list``, ``schedule``, ``jobs`` and ``agent token`` have routes of their own.
"""
