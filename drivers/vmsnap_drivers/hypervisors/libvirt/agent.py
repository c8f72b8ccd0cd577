"""The guest agent of a domain: asked through libvirt, which holds its channel, or, where there is no libvirtd, at the
channel's own socket.
"""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmsnap.errors import CannotCapture, HypervisorError
from vmsnap.model import Json
from vmsnap_drivers.hypervisors.libvirt.domain import reached
from vmsnap_drivers.qemu.agent_socket import ask_at
from vmsnap_drivers.qemu.libvirt.calls import Unreachable

CHANNEL: Final = "org.qemu.guest_agent.0"
SYNC_SECONDS: Final = 5.0
"""How long libvirt waits for a sign of life before each command (``QEMU_AGENT_WAIT_TIME``, ``src/qemu/qemu_agent.c``,
9.0)."""
_SLACK_SECONDS: Final = 2.0


@dataclass(frozen=True)
class AgentPlace:
    """Where the agent of one domain is.

    :ivar socket: that of its channel, on this host
    """

    uri: str
    uuid: str
    socket: str


def place_of(vm: str, uri: str, uuid: str, tree: ET.Element) -> AgentPlace:
    """By the XML of the running domain.

    :raises CannotCapture: it has no channel for an agent
    """
    for channel in tree.iterfind("devices/channel"):
        target, source = channel.find("target"), channel.find("source")
        if target is not None and target.get("name") == CHANNEL and source is not None and source.get("path"):
            return AgentPlace(uri, uuid, source.get("path", ""))
    raise CannotCapture(
        f"the domain of VM {vm!r} has no channel {CHANNEL} for a guest agent",
        cure="add one, and install qemu-guest-agent in the guest; or leave -o fsfreeze=yes out",
    )


def ask(place: AgentPlace, command: str, seconds: float) -> Json:
    """What the agent returns for a command without arguments. Blocks for `seconds` and for what libvirt waits for a
    sign of life; a command that is given up may be carried out later.

    :raises HypervisorError: it does not answer, or refuses
    """
    import libvirt_qemu

    text, allowed = json.dumps({"execute": command}), math.ceil(seconds)
    try:
        with reached(place.uri) as domains:
            answer = domains.find(place.uuid).call(
                f"the guest agent's {command}",
                lambda domain: str(libvirt_qemu.qemuAgentCommand(domain, text, allowed, 0)),
                SYNC_SECONDS + allowed + _SLACK_SECONDS,
            )
    except Unreachable:
        # With libvirtd it has let go of the channel; one that hangs has not, and then nobody answers here either.
        return ask_at(Path(place.socket), command, seconds)
    try:
        return json.loads(answer)["return"]
    except (ValueError, KeyError, TypeError) as e:
        raise HypervisorError(f"the guest agent answered {command} with {answer[:200]!r}") from e
