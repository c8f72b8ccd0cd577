"""A kernel whose userfaultfd reports missing pages alone, as user-mode Linux' does: it is told by its name, to every
user, so that capture by pre-copy is chosen (`tests/in_guest/test_kernel_initiator.py` has it whole).
"""

import pytest

from vmsnap_drivers.qemu import write_protection

pytestmark = pytest.mark.storage


@pytest.mark.parametrize("owner", [0, 65534])
def test_it_is_told(owner: int) -> None:
    assert write_protection.why_not_for(owner) == "this kernel's userfaultfd cannot write-protect pages"
