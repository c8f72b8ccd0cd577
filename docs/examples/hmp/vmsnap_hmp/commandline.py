"""The command line of a QEMU: what it says of the machine, and another one for a machine like it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmsnap.errors import HypervisorError

_ALONE = {"-nodefaults", "-no-shutdown", "-no-reboot", "-enable-kvm", "-S", "-daemonize", "-no-user-config"}
_PLAIN = {"-name", "-machine", "-M", "-m", "-smp", "-cpu", "-accel", "-display", "-kernel", "-append", "-initrd"}
_PLAIN |= {"-bios", "-L", "-pidfile", "-incoming", "-rtc", "-uuid"}
_NOTHING = {"-nic": "none", "-net": "none", "-vga": "none", "-serial": "none", "-parallel": "none"}
_OURS = {"-name", "-S", "-daemonize", "-pidfile", "-incoming", "-monitor", "-no-shutdown"}
"""What a loaded VM has its own of."""
_DRIVE = {"id", "file", "format", "if", "index", "cache", "aio", "readonly", "media", "bus", "unit"}


@dataclass(frozen=True)
class CommandLine:
    """The options of a QEMU in their order, each with its value; the program itself is not among them."""

    options: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, argv: Sequence[str]) -> CommandLine:
        """Understand the arguments after the program's name.

        :raises HypervisorError: something stands there that is not known
        """
        words = iter(argv)
        options: list[tuple[str, str | None]] = []
        for word in words:
            name = word.replace("--", "-", 1) if word.startswith("--") else word
            takes_value = name in _PLAIN or name in _NOTHING or name in ("-object", "-drive", "-monitor")
            if not takes_value and name not in _ALONE:
                raise HypervisorError(f"the option {word} is not known to this driver")
            options.append((name, next(words, "") if takes_value else None))
        return cls(tuple(options))

    def _values(self, name: str) -> list[str]:
        return [value or "" for option, value in self.options if option == name]

    def refusals(self) -> Iterator[str]:
        """Why the machine cannot be captured, one line each."""
        for name, value in self.options:
            if name in _NOTHING and value != _NOTHING[name]:
                yield f"{name} {value}: this driver knows only {name} {_NOTHING[name]}"
        for drive in map(pairs, self._values("-drive")):
            if not drive.keys() >= {"id", "file", "format"} or not drive.keys() <= _DRIVE:
                yield f"-drive {drive.get('id') or drive.get('file')}: it needs id, file, format, and nothing unusual"
            elif drive["format"] != "raw":
                yield f"disk {drive['id']} is {drive['format']}, this driver knows only raw"
        objects = [pairs(value) for value in self._values("-object")]
        if len(objects) != 1 or objects[0].get("memory-backend-file") is None or objects[0].get("share") != "on":
            yield "its RAM is no shared file: -object memory-backend-file,id=…,mem-path=FILE,size=…,share=on"
        elif f"memory-backend={objects[0].get('id')}" not in ",".join(self._values("-machine") + self._values("-M")):
            yield "the shared file is not the machine's RAM: -machine …,memory-backend=ID"

    @property
    def ram_path(self) -> Path:
        """The file that is the guest's RAM."""
        return Path(pairs(self._values("-object")[0])["mem-path"])

    @property
    def vcpus(self) -> int:
        """How many processors it has."""
        first = (self._values("-smp") or ["1"])[0].split(",")[0]
        return int(first) if first.isdigit() else int(pairs(",".join(self._values("-smp"))).get("cpus", "1"))

    def drives(self) -> list[str]:
        """The disks' ids, in order."""
        return [pairs(value)["id"] for value in self._values("-drive")]

    def read_only(self) -> set[str]:
        """The ids of those that the guest cannot write."""
        return {
            pairs(value)["id"] for value in self._values("-drive") if pairs(value).get("readonly") in ("on", "true")
        }

    def for_loaded(self, vm: str, ram: Path, disks: Mapping[str, str], monitor: Path, pidfile: Path) -> list[str]:
        """The arguments of a machine like this one, that waits for its state and outlives who started it."""
        argv = []
        for name, value in self.options:
            if name in _OURS:
                continue
            if name == "-object":
                value = joined({**pairs(value or ""), "mem-path": str(ram)})
            elif name == "-drive":
                drive = pairs(value or "")
                value = joined({**drive, "file": disks[drive["id"]]})
            argv += [name] if value is None else [name, value]
        monitor_value = joined({f"unix:{monitor}": "", "server": "on", "wait": "off"})
        own = ["-name", vm, "-S", "-no-shutdown", "-daemonize", "-incoming", "defer", "-monitor", monitor_value]
        return [*argv, *own, "-pidfile", str(pidfile)]


def pairs(value: str) -> dict[str, str]:
    """The parts of an option's value; a word without ``=`` is its own name. A doubled comma is a comma."""
    found: dict[str, str] = {}
    for part in value.replace(",,", "\0").split(","):
        name, equals, text = part.replace("\0", ",").partition("=")
        found[name] = text if equals else ""
    return found


def joined(parts: Mapping[str, str]) -> str:
    """The contrary of `pairs`."""
    words = [name if not value else f"{name}={value}" for name, value in parts.items()]
    return ",".join(word.replace(",", ",,") for word in words)
