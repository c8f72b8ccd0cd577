"""QEMU's command line as data: which arguments are options, and what stands in their values.

Pure. Facts from ``qemu-options.hx`` and ``util/keyval.c`` / ``util/qemu-option.c`` of QEMU, 7.2 and 10.0: values are
``key=value`` lists in which a comma of the value is doubled, the first key may be implied, a word without ``=`` is a
switch (``server``, ``nowait``); ``-blockdev``, ``-device``, ``-object``, ``-netdev``, … take JSON as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vmsnap.errors import UsageError

_SWITCHES: Final = """
    h help version mem-prealloc audio-help snapshot usb nographic portrait full-screen win2k-hack no-fd-bootchk no-
    acpi no-hpet singlestep preconfig S s enable-kvm xen-attach xen-domid-restrict no-reboot no-shutdown daemonize
    only-migratable nodefaults no-user-config enable-sync-profile perfmap jitdump old-param semihosting curses sdl
    no-quit alt-grab ctrl-grab no-frame nodefconfig show-cursor tdf async-teardown one-insn-per-tb
"""
_WITHOUT_VALUE: Final = frozenset(_SWITCHES.split())

_IMPLIED_KEYS: Final = {
    "device": "driver",
    "object": "qom-type",
    "chardev": "backend",
    "netdev": "type",
    "nic": "type",
    "net": "type",
    "machine": "type",
    "M": "type",
    "m": "size",
    "name": "guest",
    "mon": "chardev",
    "blockdev": "driver",
    "tpmdev": "type",
    "fsdev": "fsdriver",
    "virtfs": "fsdriver",
    "numa": "type",
    "accel": "accel",
    "smp": "cpus",
}


@dataclass(frozen=True)
class Argument:
    """One option of a command line, without its dashes. `name` is empty for a bare argument, which is the image of
    the first hard disk.
    """

    name: str
    value: str | None = None

    def words(self) -> list[str]:
        """The arguments to start QEMU with."""
        if not self.name:
            return [self.value or ""]
        return [f"-{self.name}"] if self.value is None else [f"-{self.name}", self.value]

    @property
    def properties(self) -> Properties:
        """The value, parsed; the first key is implied where this option has such a key."""
        return Properties.parse(self.value or "", _IMPLIED_KEYS.get(self.name, ""))

    def with_properties(self, properties: Properties) -> Argument:
        """The same option with another value."""
        return Argument(self.name, properties.text())


def parse(argv: Sequence[str]) -> list[Argument]:
    """The options of a command line; `argv` begins with the program.

    :raises UsageError: an option lacks its value
    """
    found: list[Argument] = []
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-") or word == "-":
            found.append(Argument("", word))
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        if name in _WITHOUT_VALUE:
            found.append(Argument(name))
            continue
        value = next(words, None)
        if value is None:
            raise UsageError(f"QEMU's option -{name} lacks its value")
        found.append(Argument(name, value))
    return found


def to_argv(program: str, arguments: Iterable[Argument]) -> list[str]:
    """The reverse of `parse`."""
    return [program, *(word for argument in arguments for word in argument.words())]


class Properties:
    """The value of an option: ordered keys, or a JSON object. Nested keys are written with dots (``file.filename``)
    in both.
    """

    def __init__(self, pairs: Sequence[tuple[str, str | None]], implied: str = "", tree: Any = None) -> None:
        self._pairs = list(pairs)
        self._implied = implied
        self._tree: dict[str, Any] | None = tree

    @classmethod
    def parse(cls, text: str, implied_key: str = "") -> Properties:
        """Parse a value; `implied_key` is the key of a first word that has none.

        :raises UsageError: JSON that is none
        """
        if text.startswith("{"):
            try:
                return cls([], "", json.loads(text))
            except ValueError as e:
                raise UsageError(f"QEMU's command line has damaged JSON in it: {e}") from e
        pairs: list[tuple[str, str | None]] = []
        for number, word in enumerate(split(text)):
            key, equals, value = word.partition("=")
            if not equals and not number and implied_key:
                pairs.append((implied_key, word))
            else:
                pairs.append((key, value if equals else None))
        return cls(pairs, implied_key)

    def get(self, key: str, default: str = "") -> str:
        """The value of the last occurrence of the key; a switch is ``on`` (``noNAME``: ``off``)."""
        if self._tree is not None:
            value = self._leaf(key)
            return default if value is None else _plain(value)
        for name, text in reversed(self._pairs):
            if name == key:
                return "on" if text is None else text
            if text is None and name == f"no{key}":
                return "off"
        return default

    @property
    def names(self) -> list[str]:
        """All keys, in order, nested ones with dots."""
        if self._tree is not None:
            return list(_leaves(self._tree))
        return [key for key, _ in self._pairs]

    def set(self, key: str, value: str) -> Properties:
        """Return these with `key` once, having `value`; in its place, or at the end."""
        if self._tree is not None:
            tree = json.loads(json.dumps(self._tree))
            inner = tree
            *folders, leaf = key.split(".")
            for folder in folders:
                inner = inner.setdefault(folder, {})
            inner[leaf] = value
            return Properties([], "", tree)
        pairs: list[tuple[str, str | None]] = []
        placed = False
        for name, text in self._pairs:
            if name != key:
                pairs.append((name, text))
            elif not placed:
                pairs.append((key, value))
                placed = True
        if not placed:
            pairs.append((key, value))
        return Properties(pairs, self._implied)

    def without(self, *keys: str) -> Properties:
        """Return these without the keys, their switches (``server``, ``nowait``) and whatever is nested in them."""
        if self._tree is not None:
            return Properties([], "", _pruned(self._tree, "", keys))
        gone = {*keys, *(f"no{key}" for key in keys)}
        prefixes = tuple(f"{key}." for key in keys)
        return Properties([p for p in self._pairs if p[0] not in gone and not p[0].startswith(prefixes)], self._implied)

    def text(self) -> str:
        """The value as QEMU takes it."""
        if self._tree is not None:
            return json.dumps(self._tree)
        words = []
        for number, (key, value) in enumerate(self._pairs):
            if value is None:
                words.append(escape(key))
            elif not number and key == self._implied and "=" not in value and value:
                words.append(escape(value))
            else:
                words.append(f"{key}={escape(value)}")
        return ",".join(words)

    def _leaf(self, key: str) -> Any:
        inner: Any = self._tree
        for part in key.split("."):
            if not isinstance(inner, dict) or part not in inner:
                return self._tree.get(key) if self._tree else None
            inner = inner[part]
        return inner


def split(text: str) -> list[str]:
    """The words of a value: parted by single commas, a doubled comma being one within a word."""
    words = [""]
    position = 0
    while position < len(text):
        if text[position] != ",":
            words[-1] += text[position]
        elif text[position + 1 : position + 2] == ",":
            words[-1] += ","
            position += 1
        else:
            words.append("")
        position += 1
    return [word for word in words if word]


def escape(text: str) -> str:
    """`text` as one word of a value."""
    return text.replace(",", ",,")


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if isinstance(value, str) else json.dumps(value)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _pruned(tree: dict[str, Any], prefix: str, keys: Sequence[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        if f"{prefix}{key}" in keys:
            continue
        kept[key] = _pruned(value, f"{prefix}{key}.", keys) if isinstance(value, dict) else value
    return kept
