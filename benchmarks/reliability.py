"""How many failures, kills and power cuts are tried, and what came of them; the table goes into docs/reliability.md.

    python -m benchmarks.reliability [--thorough] [--docs]

Runs those of the tests that count what they try (as root on Debian those with real guests too, after
tests/lab/install.sh) and gathers what they say. ``--thorough`` tries every call on a file and many more power cuts, and
kills for minutes: about half an hour.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.document import host, markdown_table, replace_section

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
TESTS = (
    "tests/test_backup_failures.py",
    "tests/test_duplicate_failures.py",
    "tests/test_recovery_failures.py",
    "tests/test_file_failures.py",
    "tests/test_power_loss.py",
    "tests/test_power_loss_qemu.py",
    "tests/test_kill_soak_qemu.py",
    "tests/test_libvirt_crashes.py",
)
_THOROUGH = {
    "VMSNAP_FILE_FAILURES": "1000000",
    "VMSNAP_POWER_CUTS": "1000",
    "VMSNAP_QEMU_POWER_CUTS": "100",
    "VMSNAP_SOAK_SECONDS": "300",
}
_SETTINGS = {*_THOROUGH, "VMSNAP_FILE_SEED", "VMSNAP_POWER_SEED", "VMSNAP_SOAK_SEED"}
_COUNTED = re.compile(r"^(tests/\S+?\.py::.+?): (.+)$", re.MULTILINE)


def main() -> int:
    """Run, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--thorough", action="store_true", help="try everything that can be tried")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/reliability.md")
    options = parser.parse_args()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "timeout=3600", *TESTS],
        cwd=ROOT,
        env=os.environ | (_THOROUGH if options.thorough else {}),
        stdout=subprocess.PIPE,
        text=True,
    )
    rows = _COUNTED.findall(done.stdout)
    if done.returncode or not rows:
        print(done.stdout)
        return done.returncode or 1
    # How much is tried can be set from outside, and belongs to the command then.
    settings = [f"{name}={value} " for name, value in sorted(os.environ.items()) if name in _SETTINGS]
    words = " ".join(sys.argv[1:])
    last = done.stdout.strip().splitlines()[-1]
    table = markdown_table(("test", "what was tried"), [(f"`{test.split('::')[1]}`", said) for test, said in rows])
    text = f"`{''.join(settings)}python -m benchmarks.reliability {words}` on {host()}: {last}.\n\n{table}"
    print(text)
    if options.docs:
        replace_section("reliability", text, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
