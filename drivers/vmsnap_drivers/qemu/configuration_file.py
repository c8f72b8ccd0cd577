"""QEMU's configuration files (``-readconfig``), as the options that they stand for. Pure.

Facts from ``util/qemu-config.c`` (``qemu_config_foreach``) and ``softmmu/vl.c`` (``qemu_parse_config_group``) of QEMU,
7.2 and 10.0: groups ``[device "id"]`` or ``[device]``, in them ``key = "value"``, and comments. Most groups have
the name of their option.
"""

from __future__ import annotations

import re
from typing import Final

from vmsnap.errors import UsageError
from vmsnap_drivers.qemu.commandline import Argument, Properties

_GROUP: Final = re.compile(r'\[([^"\]\s]{1,63})(?: "([^"]{1,63})")?\]\s*')
_ENTRY: Final = re.compile(r'\s*([^\s=]{1,63})\s*=\s*"([^"]{0,1023})"\s*')
_OTHER_NAMES: Final = {"memory": "m", "smp-opts": "smp", "boot-opts": "boot"}


def parse_configuration(text: str) -> list[Argument]:
    """The options of a file.

    :raises UsageError: QEMU would not take it either
    """
    groups: list[tuple[str, list[tuple[str, str | None]]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if group := _GROUP.fullmatch(line):
            groups.append((_OTHER_NAMES.get(group[1], group[1]), [("id", group[2])] if group[2] else []))
        elif groups and (entry := _ENTRY.fullmatch(line)):
            groups[-1][1].append((entry[1], entry[2]))
        else:
            raise UsageError(f"line {number} is no group and no entry of a configuration of QEMU's")
    return [Argument(name, Properties(pairs).text()) for name, pairs in groups]
