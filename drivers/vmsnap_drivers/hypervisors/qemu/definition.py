"""What is kept of a VM so that it can be made to exist again: plain data, without secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from vmsnap.model import Json
from vmsnap_drivers.qemu.commandline import Argument, Properties
from vmsnap_drivers.qemu.stored_definition import read_definition

FORMAT: Final = 1


@dataclass(frozen=True)
class DefinedDisk:
    """A disk of the command line: which argument makes it (None: none does), under which names."""

    device: str
    argument: int | None
    node: str
    address: str
    format: str
    read_only: bool


@dataclass(frozen=True)
class Definition:
    """A QEMU process and its machine.

    :ivar arguments: name and value of each option of the command line
    :ivar machine: machine type with its version
    :ivar tpm: version of the emulated TPM, ``2.0`` or ``1.2``; empty where there is none
    :ivar default_ram: the RAM block that ``-m`` makes; empty where an ``-object`` makes it
    """

    format: int
    exe: str
    cwd: str
    environment: Mapping[str, str]
    version: tuple[int, int, int]
    machine: str
    default_ram: str
    arguments: tuple[tuple[str, str | None], ...]
    disks: tuple[DefinedDisk, ...]
    tpm: str = ""

    def options(self) -> list[Argument]:
        """The command line as it was."""
        return [Argument(name, value) for name, value in self.arguments]

    def to_json(self) -> Json:
        """Plain JSON for `VmDescription.definition`."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Json) -> Definition:
        """The reverse of `to_json`.

        :raises HypervisorError: it is none of ours
        """
        return read_definition(content, cls, FORMAT)


_SECRETS: Final = (
    # A user with a password in a URL: ":" for curl and ssh, "%" for iSCSI (block/iscsi.c).
    re.compile(r"://[^/@,\s]*[:%][^/@,\s]*@"),
    # The key of a Ceph user (block/rbd.c).
    re.compile(r"\brbd:.*:key="),
    # Properties and JSON keys such as "password", "proxy-password".
    re.compile(r"password[\"']?\s*[=:]\s*[\"']?(?!on\b|off\b)[^,\s\"'}]"),
)


def without_secrets(arguments: Sequence[Argument]) -> tuple[list[Argument], list[str]]:
    """The arguments with secrets cut out, and one line for each that a load would miss."""
    cleaned: list[Argument] = []
    found: list[str] = []
    for argument in arguments:
        changed = argument
        if argument.name == "object" and argument.properties.get("qom-type") == "secret":
            properties = argument.properties
            if properties.get("data"):
                found.append(
                    f"secret {properties.get('id')!r} stands in QEMU's command line, where it cannot be kept from"
                    " (use -object secret,file=… instead of data=…)"
                )
                changed = argument.with_properties(properties.without("data"))
        elif argument.name in ("spice", "iscsi", "vnc") and "password" in (argument.value or ""):
            properties = Properties.parse(argument.value or "")
            if properties.get("password", "on") not in ("on", "off"):
                found.append(f"a password stands in QEMU's option -{argument.name} (use password-secret=…)")
                changed = Argument(argument.name, properties.without("password").text())
        elif any(pattern.search(argument.value or "") for pattern in _SECRETS):
            found.append(f"a password stands in QEMU's option -{argument.name} (use password-secret=…)")
            changed = Argument(argument.name, "")
        cleaned.append(changed)
    return cleaned, found
