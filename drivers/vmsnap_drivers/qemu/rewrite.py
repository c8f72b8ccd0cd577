"""The command line of a VM that is brought back, made from the one it was captured with.

The guest's hardware must be the same to the last detail, or QEMU refuses the device state; everything through which
the VM touches the host must be its own: disks, RAM, sockets, files, ports, networks. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmsnap_drivers.qemu.commandline import Argument, Properties, to_argv
from vmsnap_drivers.qemu.disk_arguments import children, with_image
from vmsnap_drivers.qemu.own_paths import OwnPaths

_DROPPED_WORDS: Final = """
    S incoming loadvm daemonize mem-prealloc mem-path gdb s qmp qmp-pretty monitor mon vnc spice display sdl curses
    full-screen nographic chroot D d trace name preconfig pidfile
"""
_DROPPED: Final = frozenset(_DROPPED_WORDS.split())
_CHARACTER_DEVICES: Final = frozenset(["serial", "parallel", "virtioconsole", "debugcon", "fdc-serial"])
PID_NAME: Final = "qemu.pid"
"""In the run folder; so every command line names the folder, and a process without a mark is found by it."""
TPM_SOCKET_NAME: Final = "tpm.sock"
"""In the run folder: where the swtpm of the VM's own listens."""
_MEETING_POINTS: Final = frozenset(["socket", "stream", "dgram", "vde", "l2tpv3"])
"""Networks that are an address, where the original is or listens."""
_OWN_PATH_KEYS: Final = ("path", "logfile", "input-path")
_QUIET_BACKENDS: Final = frozenset(["null", "ringbuf", "memory", "vc", "pty", "mux", "hub"])


@dataclass(frozen=True)
class NewDisk:
    """Where a disk of the command line lies now."""

    argument: int
    node: str
    address: str
    format: str


@dataclass(frozen=True)
class NewVm:
    """What is different in the VM that is brought back.

    :ivar run_folder: its sockets and files go there
    :ivar machine: the machine type with its version, such as ``pc-i440fx-7.2``
    :ivar images: for each RAM block, by name, the file that is its RAM
    :ivar take_images: the VM's writes go into those files; else each VM has its own copy of what it writes
    :ivar block_sizes: bytes of each RAM block, by name
    :ivar default_ram: the RAM block that ``-m`` makes where no ``-object`` does (``pc.ram``); empty where one does
    :ivar slirp_instances: the numbers that the networks of type ``user`` have in the device state, in their order
    :ivar takeover: the original is gone for good, and the VM takes its place: sockets, logs, ports and networks are
        where they were; its files go on instead of being begun anew
    """

    name: str
    run_folder: Path
    qmp_socket: Path
    machine: str
    disks: tuple[NewDisk, ...]
    isolated: bool
    images: Mapping[str, Path] = field(default_factory=dict)
    take_images: bool = False
    block_sizes: Mapping[str, int] = field(default_factory=dict)
    default_ram: str = ""
    takeover: bool = False
    slirp_instances: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rewritten:
    """A command line, and one line for each thing that could not be kept."""

    argv: list[str]
    notes: list[str]


def rewrite(program: str, arguments: Sequence[Argument], new: NewVm) -> Rewritten:
    """Make the command line that brings the VM back: stopped, and waiting for its state (``-incoming defer -S``)."""
    return _Rewriter(new).run(program, arguments)


class _Rewriter:
    def __init__(self, new: NewVm) -> None:
        self.new = new
        self.notes: list[str] = []
        self._hub = 0
        self._added: list[Argument] = []
        self._own = OwnPaths(new.run_folder, {new.qmp_socket.name, PID_NAME, TPM_SOCKET_NAME})
        self._tpms: set[str] = set()

    def run(self, program: str, arguments: Sequence[Argument]) -> Rewritten:
        new = self.new
        disks = {disk.argument: disk for disk in new.disks}
        self._tpms = {a.properties.get("chardev") for a in arguments if a.name == "tpmdev"} - {""}
        roots = [disk.node for disk in new.disks if arguments[disk.argument].name == "blockdev"]
        unused = children(arguments, roots) - children(arguments, self._kept_roots(arguments, set(roots)))
        kept: list[Argument] = []
        for number, argument in enumerate(arguments):
            if number in disks:
                kept.append(with_image(argument, disks[number].address, disks[number].format, arguments))
            elif argument.name == "blockdev" and argument.properties.get("node-name") in unused:
                continue
            elif argument.name not in _DROPPED or self._is_awaited(argument):
                changed = self._change(argument)
                if changed is not None:
                    kept.append(changed)
        names = {argument.name for argument in arguments}
        implied = self._implied(names)
        kept = self._with_gaps([*kept, *self._added, *implied])
        kept.append(Argument("pidfile", str(new.run_folder / PID_NAME)))
        kept = self._with_machine(self._with_ram(kept))
        kept += [
            Argument("name", self._name(arguments)),
            Argument("display", "none"),
            Argument("qmp", Properties([(f"unix:{new.qmp_socket}", None), ("server", "on"), ("wait", "off")]).text()),
            Argument("incoming", "defer"),
            Argument("S"),
        ]
        return Rewritten(to_argv(program, kept), self.notes)

    def _kept_roots(self, arguments: Sequence[Argument], replaced: set[str]) -> list[str]:
        nodes = [a.properties.get("node-name") for a in arguments if a.name == "blockdev"]
        below = children(arguments, nodes)
        return [node for node in nodes if node not in replaced and node not in below]

    def _is_awaited(self, argument: Argument) -> bool:
        """Whether it is a screen, or a monitor of somebody else's, who waits for the VM that is replaced."""
        if not self.new.takeover or argument.name not in ("qmp", "vnc"):
            return False
        if argument.name == "vnc":
            return True
        path = (argument.properties.names or [""])[0]
        return path.startswith("unix:") and path != f"unix:{self.new.qmp_socket}"

    def _change(self, argument: Argument) -> Argument | None:
        if argument.name == "chardev" and argument.properties.get("id") in self._tpms:
            return Argument("chardev", self._tpm(argument.properties.get("id")))
        if argument.name == "chardev":
            taken_over = self._taken_over(argument.properties) if self.new.takeover else None
            return argument.with_properties(taken_over or self._chardev(argument.properties))
        if argument.name == "qmp":
            return Argument("qmp", _listening(Properties.parse(argument.value or "")).text())
        if argument.name in _CHARACTER_DEVICES and argument.value is not None:
            return Argument(argument.name, self._legacy_chardev(argument.value))
        if argument.name in ("netdev", "nic"):
            return argument.with_properties(self._netdev(argument.properties))
        if argument.name == "net":
            return self._net(argument)
        if argument.name == "run-with":
            return argument.with_properties(argument.properties.without("chroot"))
        if argument.name in ("fsdev", "virtfs") and self.new.isolated:
            self.notes.append(f"the shared folder {argument.properties.get('id')!r} is read-only")
            return argument.with_properties(argument.properties.set("readonly", "on"))
        # Also of a VM that takes the place of another: QEMU would begin that one's file anew.
        if argument.name == "object" and argument.properties.get("qom-type") == "filter-dump":
            return argument.with_properties(self._with_own(argument.properties, "file"))
        if argument.name == "audiodev":
            return argument.with_properties(self._with_own(argument.properties, "path"))
        return argument

    def _with_own(self, old: Properties, key: str) -> Properties:
        """The same with a file of the VM's own: QEMU would begin the original's anew."""
        return old.set(key, str(self._own.give(old.get(key)))) if old.get(key) else old

    def _chardev(self, old: Properties) -> Properties:
        backend = old.get("backend")
        changed = old
        for key in _OWN_PATH_KEYS:
            if old.get(key):
                changed = changed.set(key, str(self._own.give(old.get(key))))
        if backend in _QUIET_BACKENDS:
            return changed
        is_server = old.get("server", "off") == "on"
        if backend == "socket" and old.get("path") and is_server:
            return _listening(changed)
        if backend in ("file", "pipe") and old.get("path"):
            return changed if backend == "file" else _null(old)
        self.notes.append(f"character device {old.get('id')!r} ({backend}) is connected to nothing")
        return _null(old)

    def _tpm(self, identity: str) -> str:
        pairs = [("backend", "socket"), ("id", identity), ("path", str(self.new.run_folder / TPM_SOCKET_NAME))]
        return Properties(pairs, "backend").text()

    def _taken_over(self, old: Properties) -> Properties | None:
        """A character device where the original had it; None where that cannot be."""
        kept = old.set("logappend", "on") if old.get("logfile") else old
        backend, path = old.get("backend"), old.get("path")
        if backend == "file" and path:
            return kept.set("append", "on")
        if backend == "socket" and path and old.get("server", "off") == "on":
            return None if Path(path) == self.new.qmp_socket else _listening(kept)
        return None

    def _legacy_chardev(self, value: str) -> str:
        kind, colon, rest = value.partition(":")
        if kind == "mon":
            return self._legacy_chardev(rest)
        if kind in ("chardev", "none", "null", "vc", "pty", "msmouse", "braille"):
            return value
        properties = Properties.parse(rest)
        path = properties.names[0] if properties.names else ""
        if kind == "unix" and properties.get("server", "off") == "on":
            place = path if self.new.takeover else self._own.give(path)
            moved = Properties([(f"unix:{place}", None), ("server", "on"), ("wait", "off")])
            return moved.text()
        if kind == "file" and colon:
            return Properties([(f"file:{self._own.give(path)}", None)]).text()
        self.notes.append(f"character device {value.partition(',')[0]!r} is connected to nothing")
        return "null"

    def _netdev(self, old: Properties) -> Properties:
        kind = old.get("type")
        if kind == "none":
            return old
        if self.new.isolated or old.get("fd") or old.get("fds"):
            if not self.new.isolated:
                self.notes.append(
                    f"network {old.get('id')!r} was handed over as a descriptor: it is connected to nothing"
                )
            return self._unconnected(old, kind)
        if self.new.takeover:
            return old
        if kind in _MEETING_POINTS:
            self.notes.append(
                f"network {old.get('id')!r} ({kind}) is connected to nothing, as the original may be there"
            )
            return self._unconnected(old, kind)
        if any(key in ("hostfwd", "guestfwd") for key in old.names):
            self.notes.append(
                f"network {old.get('id')!r}: its forwarded ports are left out, the original may have them"
            )
            return old.without("hostfwd", "guestfwd")
        return old

    def _unconnected(self, old: Properties, kind: str) -> Properties:
        kept = [(key, old.get(key)) for key in ("id", "model", "mac", "macaddr", "addr", "vectors") if old.get(key)]
        if kind in ("tap", "bridge"):
            # The device state asks for the header of TAP (virtio_net_vnet_post_load), which a hub port has not. This
            # TAP is on no bridge, and down.
            return Properties(
                [("type", "tap"), *kept, ("script", "no"), ("downscript", "no"), ("vhost", "off")], "type"
            )
        if kind == "user":
            self._take_slirp()
        self._hub += 1
        return Properties([("type", "hubport"), ("hubid", str(1000 + self._hub)), *kept], "type")

    def _net(self, argument: Argument) -> Argument | None:
        kind = argument.properties.get("type")
        if kind in ("nic", "none"):
            return argument
        if not self.new.isolated:
            return Argument(argument.name, self._netdev(argument.properties).text())
        if kind == "user":
            self._take_slirp()
        return None

    def _take_slirp(self) -> None:
        """The stream has a section "slirp" (net/slirp.c), which somebody must take. This one is connected to no NIC."""
        taker = [("type", "user"), ("id", f"vmsnap-slirp{self._hub}"), ("restrict", "on")]
        self._added.append(Argument("netdev", Properties(taker, "type").text()))

    def _with_gaps(self, arguments: list[Argument]) -> list[Argument]:
        """QEMU numbers the networks of type ``user`` as it makes them. Where one was removed at run time, the later
        ones keep their numbers in the device state, and another stands in for it.
        """
        wanted = iter(self.new.slirp_instances)
        changed: list[Argument] = []
        made = 0
        for argument in arguments:
            if argument.name == "netdev" and argument.properties.get("type") == "user":
                instance = next(wanted, made)
                for number in range(made, instance):
                    filler = [("type", "user"), ("id", f"vmsnap-gone{number}"), ("restrict", "on")]
                    changed.append(Argument("netdev", Properties(filler, "type").text()))
                made = max(made, instance) + 1
            changed.append(argument)
        return changed

    def _implied(self, names: set[str]) -> list[Argument]:
        """What QEMU makes by itself when its options do not say otherwise, as far as it touches the host."""
        if "nodefaults" in names:
            return []
        added = []
        if "serial" not in names and "nographic" in names:
            added.append(Argument("serial", "null"))
        if "parallel" not in names and "nographic" in names:
            added.append(Argument("parallel", "null"))
        if not names & {"net", "netdev", "nic"} and self.new.isolated:
            added.append(Argument("net", "nic"))
            self._take_slirp()
        return [*added, Argument("monitor", "none")]

    def _with_machine(self, arguments: list[Argument]) -> list[Argument]:
        found = False
        changed: list[Argument] = []
        for argument in arguments:
            if argument.name in ("machine", "M"):
                properties = (
                    argument.properties.without("type") if found else argument.properties.set("type", self.new.machine)
                )
                if not found and properties.names[0] != "type":
                    properties = Properties.parse(f"type={self.new.machine},{properties.without('type').text()}")
                if self.new.default_ram in self.new.images and not found:
                    properties = properties.set("memory-backend", self.new.default_ram)
                found = True
                argument = argument.with_properties(properties)
            changed.append(argument)
        if not found:
            properties = Properties([("type", self.new.machine)], "type")
            if self.new.default_ram in self.new.images:
                properties = properties.set("memory-backend", self.new.default_ram)
            changed.append(Argument("machine", properties.text()))
        return changed

    def _with_ram(self, arguments: list[Argument]) -> list[Argument]:
        changed: list[Argument] = []
        for argument in arguments:
            properties = argument.properties if argument.name == "object" else None
            if properties is not None and properties.get("qom-type").startswith("memory-backend-"):
                identity = properties.get("id")
                changed.append(Argument("object", self._backend(identity, properties)))
            else:
                changed.append(argument)
        if self.new.default_ram in self.new.images:
            changed.append(Argument("object", self._backend(self.new.default_ram, None)))
        return changed

    def _backend(self, identity: str, old: Properties | None) -> str:
        kept = [
            (key, old.get(key))
            for key in ("x-use-canonical-path-for-ramblock-id", "size")
            if old is not None and old.get(key)
        ]
        image = next(
            (path for name, path in self.new.images.items() if name in (identity, f"/objects/{identity}")), None
        )
        if image is None:
            return Properties([("qom-type", "memory-backend-ram"), ("id", identity), *kept], "qom-type").text()
        size = next(size for name, size in self.new.block_sizes.items() if name in (identity, f"/objects/{identity}"))
        kept = [pair for pair in kept if pair[0] != "size"]
        share = "on" if self.new.take_images else "off"
        pairs = [("id", identity), ("mem-path", str(image)), ("share", share), ("size", str(size)), *kept]
        return Properties([("qom-type", "memory-backend-file"), *pairs], "qom-type").text()

    def _name(self, arguments: Sequence[Argument]) -> str:
        old = next((a.properties for a in arguments if a.name == "name"), Properties([], "guest"))
        if self.new.takeover and old.get("guest"):
            return old.without("process").text()
        return Properties([("guest", self.new.name)], "guest").text() + (
            f",debug-threads={old.get('debug-threads')}" if old.get("debug-threads") else ""
        )


def _listening(properties: Properties) -> Properties:
    return (
        properties.without("wait", "server", "reconnect", "reconnect-ms", "fd").set("server", "on").set("wait", "off")
    )


def _null(old: Properties) -> Properties:
    return Properties([("backend", "null"), ("id", old.get("id"))], "backend")
