"""The transcript on the page of LVM is what its commands print."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.in_guest.volumes import make_pool, make_thick, make_thin, volume_group
from tests.pages import see

pytestmark = [pytest.mark.storage]


def test_the_page_of_lvm(tmp_path: Path) -> None:
    with volume_group(tmp_path, "vg0", 64) as group:
        make_pool(group, "pool", 16)
        make_thin(group, "pool", "web1", 1)
        make_thick(group, "web1-data", 1)
        see("lvm.md", tmp_path)
