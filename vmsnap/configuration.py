"""The configuration file: TOML, read strictly, so that a misspelt key is an error and not a silent default.

::

    repository = "file:///srv/backups"        # what -r would say
    state_dir = "/var/lib/vmsnap"
    spool_dir = "/srv/spool"                  # allows guest RAM on a disk when memory is short
    duplicates_dir = "/srv/vms/duplicates"    # where disks of duplicates are made; beside the VMs' own, reflinks work
    cache_dir = "/var/cache/vmsnap"           # where the index of a remote repository is kept
    chunk_cache = "1GiB"                      # what may be kept there of each remote one's chunks; 0: none
    memory_budget = "8GiB"                    # what duplicates may take in memory together
    compression_level = 1                     # of zstd, from -7 (fastest) to 19 (smallest)
    freeze = "overlay"                        # what vmsnap backup --freeze says where it is not given; else "none"
    passphrase_file = "/etc/vmsnap/passphrase"
    passphrase_command = "pass show backups"  # instead of passphrase_file; run without a shell

    [mechanism.qcow2]                         # options of a snapshot mechanism
    some_option = "value"

    [storage.s3]                              # options of a storage backend
    endpoint = "https://s3.example.com"

    [schedule.nightly]                        # see vmsnap.agent.schedule
    cron = "30 2 * * *"

    [agent]                                   # see vmsnap.agent.settings
    jobs_at_once = 2

Paths are absolute or begin with ``~``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmsnap.errors import UsageError

SYSTEM_FILE = Path("/etc/vmsnap/config.toml")

_SIZE = re.compile(r"(\d+)\s*(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


_DURATION_PART = re.compile(r"(\d{1,9})\s*(s|min|h|d|w|y)", re.IGNORECASE)
_DURATION = re.compile(rf"({_DURATION_PART.pattern}\s*)+", re.IGNORECASE)
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}


@dataclass(frozen=True)
class Configuration:
    """What the file says; None where it says nothing. `source` is the file, None where there is none. `schedules` and
    `agent` are as they stand there: the agent reads them, as strictly.
    """

    source: Path | None = None
    repository: str | None = None
    state_dir: Path | None = None
    spool_dir: Path | None = None
    duplicates_dir: Path | None = None
    cache_dir: Path | None = None
    chunk_cache_bytes: int | None = None
    memory_budget_bytes: int | None = None
    compression_level: int | None = None
    freeze: str | None = None
    passphrase_file: Path | None = None
    passphrase_command: str | None = field(default=None, repr=False)
    mechanism_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    storage_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    schedules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    agent: Mapping[str, Any] = field(default_factory=dict)


def parse_size(text: str) -> int:
    """The bytes that a size such as ``64M``, ``8GiB`` or ``4096`` means; K, M, G and T are powers of 1024.

    :raises UsageError: it is no size
    """
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise UsageError(f"{text!r} is no size", cure="write it as 4096, 64M or 8GiB")
    return int(found[1]) * _FACTORS[(found[2] or "").upper()]


def parse_duration(text: str) -> int:
    """The seconds that a duration such as ``90s``, ``30min``, ``12h``, ``30d``, ``2w``, ``1y`` or ``1d12h`` means; a
    year has 365 days.

    :raises UsageError: it is no duration
    """
    parts = _DURATION_PART.findall(text)
    if not parts or not _DURATION.fullmatch(text.strip()):
        raise UsageError(f"{text!r} is no duration", cure="write it as 12h, 30d, 2w or 1y; minutes are min")
    return sum(int(number) * _SECONDS[unit.lower()] for number, unit in parts)


def find_file(given: Path | None = None) -> Path | None:
    """The configuration file: the one `given`, that of ``VMSNAP_CONFIG``, the user's own, the system's; or None.

    :raises UsageError: a file that was named does not exist
    """
    named = given or (Path(os.environ["VMSNAP_CONFIG"]) if os.environ.get("VMSNAP_CONFIG") else None)
    if named is not None:
        if not named.is_file():
            raise UsageError(f"there is no configuration file {named}", cure="see --config and VMSNAP_CONFIG")
        return named
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()) / "vmsnap" / "config.toml"
    return next((path for path in (own, SYSTEM_FILE) if path.is_file()), None)


def load(given: Path | None = None) -> Configuration:
    """Read the configuration file that `find_file` finds; where there is none, nothing is configured.

    :raises UsageError: it cannot be read, is no TOML, or holds an unknown key or a wrong value
    """
    path = find_file(given)
    if path is None:
        return Configuration()
    import tomllib

    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as e:
        raise UsageError(f"cannot read the configuration file {path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"the configuration file {path} is no TOML: {e}") from e
    return _Reader(path, values).configuration()


class _Reader:
    """Takes the known keys out of the file's values, and refuses what is left."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self._path = path
        self._values = dict(values)

    def configuration(self) -> Configuration:
        found = Configuration(
            source=self._path,
            repository=self._repository(),
            state_dir=self._folder("state_dir"),
            spool_dir=self._folder("spool_dir"),
            duplicates_dir=self._folder("duplicates_dir"),
            cache_dir=self._folder("cache_dir"),
            chunk_cache_bytes=self._size("chunk_cache", least=0),
            memory_budget_bytes=self._size("memory_budget"),
            compression_level=self._level("compression_level"),
            freeze=self._freeze(),
            passphrase_file=self._folder("passphrase_file"),
            passphrase_command=self._text("passphrase_command"),
            mechanism_options=self._driver_options("mechanism", "qcow2"),
            storage_options=self._driver_options("storage", "s3"),
            schedules=self._tables("schedule"),
            agent=self._table("agent"),
        )
        if self._values:
            raise self._wrong(f"unknown key {sorted(self._values)[0]!r}", "see the documentation of the configuration")
        if found.passphrase_file and found.passphrase_command:
            raise self._wrong("passphrase_file and passphrase_command exclude each other")
        return found

    def _wrong(self, what: str, cure: str = "") -> UsageError:
        return UsageError(f"configuration file {self._path}: {what}", cure=cure)

    def _text(self, key: str) -> str | None:
        value = self._values.pop(key, None)
        if value is not None and (not isinstance(value, str) or not value):
            raise self._wrong(f"{key} must be a text that is not empty")
        return value

    def _folder(self, key: str) -> Path | None:
        text = self._text(key)
        return None if text is None else self._absolute(key, text)

    def _absolute(self, key: str, text: str) -> Path:
        path = Path(text).expanduser()
        if not path.is_absolute():
            raise self._wrong(f"{key} must be an absolute path, or begin with ~")
        return path

    def _repository(self) -> str | None:
        text = self._text("repository")
        if text is None or "://" in text:
            return text
        return str(self._absolute("repository", text))

    def _size(self, key: str, least: int = 1) -> int | None:
        value = self._values.pop(key, None)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self._wrong(f"{key} must be a size, such as '8GiB'")
        try:
            size = parse_size(str(value))
        except UsageError as e:
            raise self._wrong(f"{key}: {e.message}", e.cure) from e
        if size < least:
            raise self._wrong(f"{key} must be more than 0")
        return size

    def _level(self, key: str) -> int | None:
        value = self._values.pop(key, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not -7 <= value <= 19):
            raise self._wrong(f"{key} must be a whole number from -7 to 19")
        return value

    def _freeze(self) -> str | None:
        value = self._text("freeze")
        if value not in (None, "none", "overlay"):
            raise self._wrong("freeze must be 'none' or 'overlay'")
        return value

    def _driver_options(self, kind: str, example: str) -> dict[str, dict[str, str]]:
        tables = self._values.pop(kind, {})
        if not isinstance(tables, dict):
            raise self._wrong(f"{kind} must be tables, such as [{kind}.{example}]")
        found: dict[str, dict[str, str]] = {}
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise self._wrong(f"{kind}.{name} must be a table, such as [{kind}.{example}]")
            found[name] = {key: self._option(f"{kind}.{name}.{key}", value) for key, value in table.items()}
        return found

    def _table(self, key: str) -> dict[str, Any]:
        table = self._values.pop(key, {})
        if not isinstance(table, dict):
            raise self._wrong(f"{key} must be a table, [{key}]")
        return table

    def _tables(self, key: str) -> dict[str, dict[str, Any]]:
        tables = self._table(key)
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise self._wrong(f"{key}.{name} must be a table, [{key}.{name}]")
        return tables

    def _option(self, key: str, value: object) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str | int | float):
            return str(value)
        raise self._wrong(f"{key} must be a text or a number")
