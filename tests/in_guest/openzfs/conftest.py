"""These tests are collected where OpenZFS was built for them, and asked for: ``make test-openzfs``."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("VMSNAP_OPENZFS") else ["test_*.py"]
