"""What driver authors test with: contract suites to inherit, and wrappers that inject faults.

Each suite is a class of numbered scenarios; a driver joins by inheriting it and giving it fixtures that start real
things and look at them past the driver. The suites need the extra ``testing``; `vmsnap.testing.faults` needs nothing.
"""

import sys

# Assertions in a package are bare unless pytest is told to rewrite them. Where pytest was not imported before us, no
# test runs, and the fault wrappers alone are wanted.
if "pytest" in sys.modules:
    sys.modules["pytest"].register_assert_rewrite(
        "vmsnap.testing.bringing_back",
        "vmsnap.testing.cloning",
        "vmsnap.testing.crashes",
        "vmsnap.testing.crashing",
        "vmsnap.testing.crashing_verbs",
        "vmsnap.testing.figures",
        "vmsnap.testing.hypervisor",
        "vmsnap.testing.rigs",
        "vmsnap.testing.snapshot",
        "vmsnap.testing.snapshot_life",
        "vmsnap.testing.snapshot_machine",
        "vmsnap.testing.storage",
        "vmsnap.testing.taking_over",
    )
