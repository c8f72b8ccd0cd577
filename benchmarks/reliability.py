"""How many failures, kills and power cuts are tried, and what came of them; the table goes into docs/reliability.md.

    python -m benchmarks.reliability [--thorough] [--docs]

Runs those of the tests that count what they try (as root on Debian those with real guests too, after
tests/lab/install.sh) and gathers what they say. Where one fails, the others are told all the same, that one is named,
and the page stays as it is. ``--thorough`` tries every call on a file and many more power cuts, and kills for minutes:
about half an hour.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.document import host, markdown_table, replace_section
from tests import left_out

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
    "tests/test_qemu_crashes.py",
    "tests/test_libvirt_crashes.py",
)
_THOROUGH = {
    "VMSNAP_FILE_FAILURES": "1000000",
    "VMSNAP_POWER_CUTS": "1000",
    "VMSNAP_QEMU_POWER_CUTS": "100",
    "VMSNAP_SOAK_SECONDS": "300",
}
_SETTINGS = {*_THOROUGH, "VMSNAP_FILE_SEED", "VMSNAP_POWER_SEED", "VMSNAP_SOAK_SEED"}


@dataclass(frozen=True)
class Tried:
    """What became of one test, and what it says of what it tried: nothing, where it does not count."""

    name: str
    outcome: str
    text: str
    cases: int
    pause_seconds: float | None


def read(report: Path) -> tuple[list[Tried], float]:
    """The tests of a JUnit report of pytest's, and how many seconds all took."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"{report} is no report of pytest's")
    found = []
    for test in suite.iter("testcase"):
        said = {each.get("name"): each.get("value", "") for each in test.iter("property")}
        outcome = next((tag for tag in ("failure", "error", "skipped") if test.find(tag) is not None), "passed")
        pause = said.get("pause_seconds")
        found.append(
            Tried(
                test.get("name", ""), outcome, said.get("counted", ""), int(said.get("cases", 0)),
                None if pause is None else float(pause),
            )
        )  # fmt: skip
    return found, float(suite.get("time", 0))


def table(tests: Sequence[Tried]) -> str:
    """What those say that passed and count, and all of them together."""

    def row(name: str, cases: int, pauses: Sequence[float], text: str) -> tuple[str, str, str, str]:
        return name, f"{cases:,}", f"{max(pauses) * 1000:.0f} ms" if pauses else "", text

    counting = [test for test in tests if test.outcome == "passed" and test.text]
    rows = [
        row(f"`{test.name}`", test.cases, [] if test.pause_seconds is None else [test.pause_seconds], test.text)
        for test in counting
    ]
    pauses = [test.pause_seconds for test in counting if test.pause_seconds is not None]
    wrong = sum(test.outcome != "passed" for test in tests)
    told = f"without the {wrong} tests that did not pass" if wrong else "survived, nothing lost"
    rows.append(row("**all**", sum(test.cases for test in counting), pauses, told))
    return markdown_table(("test", "cases", "longest pause seen", "what was tried, and what came of it"), rows)


def main() -> int:
    """Run, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--thorough", action="store_true", help="try everything that can be tried")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/reliability.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vmsnap-") as folder:
        report = Path(folder) / "report.xml"
        words = ["-v", "-o", "timeout=3600", "-o", "junit_duration_report=total", f"--junitxml={report}"]
        words += ["-n", str(len(os.sched_getaffinity(0))), "--dist", "loadfile", *TESTS]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            cwd=ROOT,
            # What the suite leaves out belongs to it.
            env=os.environ | {left_out.VARIABLE: "1"} | (_THOROUGH if options.thorough else {}),
            stdout=sys.stderr.fileno(),
        )
        if not report.exists():
            print(f"pytest ended with {done.returncode} and has left no report", file=sys.stderr)
            return done.returncode or 1
        tests, seconds = read(report)
    # How much is tried can be set from outside, and belongs to the command then.
    settings = [f"{name}={value} " for name, value in sorted(os.environ.items()) if name in _SETTINGS]
    command = " ".join(["python -m benchmarks.reliability", *sys.argv[1:]])
    passed = sum(test.outcome == "passed" for test in tests)
    text = (
        f"`{''.join(settings)}{command}` on {host()}: {passed} of {len(tests)} tests passed in {seconds:.0f} s.\n\n"
        f"{table(tests)}"
    )
    print(text)
    wrong = [test for test in tests if test.outcome != "passed"]
    if wrong or done.returncode or not passed:
        for test in wrong:
            print(f"{test.outcome}: {test.name}", file=sys.stderr)
        print(f"pytest ended with {done.returncode}; {PAGE.relative_to(ROOT)} stays as it was", file=sys.stderr)
        return done.returncode or 1
    if options.docs:
        replace_section("reliability", text, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
