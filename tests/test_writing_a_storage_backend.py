"""The guide for authors of storage backends: its files, put together as they stand there, keep backups.

That they pass the contract is seen on the path of a newcomer, in tests/test_out_of_tree_examples.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.world import World
from vmsnap.errors import StorageError

GUIDE = Path(__file__).parent.parent / "docs" / "writing-a-storage-backend.md"
_NAMED = re.compile(r"^File `([^`]+)`:$")


def files_in(text: str) -> dict[str, str]:
    """The files that a guide builds up: a block belongs to the file that was named last, if it is of that kind."""
    found: dict[str, str] = {}
    name = ""
    for part in re.split(r"^(File `[^`]+`:|```\w*\n.*?^```)$", text, flags=re.DOTALL | re.MULTILINE):
        if named := _NAMED.match(part):
            name = named[1]
        elif part.startswith(("```python\n", "```toml\n")):
            found[name] = found.get(name, "") + part.partition("\n")[2].removesuffix("```") + "\n"
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder with the guide's files, and the one that it is installed in."""
    source, site = tmp_path_factory.mktemp("guide"), tmp_path_factory.mktemp("site")
    for name, content in files_in(GUIDE.read_text()).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--target", str(site), str(source)], check=True)
    return source, site


def environment(site: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(site)}


def test_the_trap_that_it_tells_of_is_one(installed: tuple[Path, Path], tmp_path: Path) -> None:
    """Its first `get`, with somebody who replaces the object in the middle of it."""
    module = (installed[0] / "vmsnap_sqlite" / "__init__.py").read_text()
    first, second = (match.start() for match in re.finditer(r"^    def get\(", module, re.MULTILINE))
    assert first < second
    trapped: dict[str, Any] = {"__name__": "trapped"}
    exec(module[:second] + module[module.index("    def properties(") :], trapped)

    first_form: Any = trapped["SqliteStorage"]

    class Replaced(first_form):
        def _row(self, key: str) -> tuple[int, int] | None:
            row: tuple[int, int] | None = super()._row(key)
            self.put(key, b"the new one")
            return row

    storage = Replaced(f"sqlite://{tmp_path}/objects.db", {})
    storage.create()
    storage.put("x", b"old")
    with pytest.raises(StorageError, match="no such rowid"):
        storage.get("x")
    storage.close()


def test_a_repository_lives_in_it(installed: tuple[Path, Path], world: World) -> None:
    _, site = installed
    url = f"sqlite://{world.folder}/repository.db"

    def vmsnap(*words: str) -> str:
        argv = [str(Path(sys.executable).with_name("vmsnap")), *words, "--state-dir", str(world.folders.state_dir)]
        done = subprocess.run(argv, env=environment(site), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "sqlite" in vmsnap("drivers")
    vmsnap("init", "-r", url)
    backup = json.loads(vmsnap("backup", "vm001", "-r", url, "--json"))["backup"]
    assert not json.loads(vmsnap("check", "--read-data", "-r", url, "--json"))["findings"]
    vmsnap("export", backup, "--output", str(world.folder / "exported"), "-r", url)
    assert {path.name for path in (world.folder / "exported").iterdir()} == {"disk0.raw", "disk1.raw"}
