"""Where targets are served: this host, or storage appliances that are reached over SSH, chosen by the portal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from vmsnap.errors import DriverUnavailable, SnapshotError, UsageError
from vmsnap_drivers.runner import LocalRunner, Runner
from vmsnap_drivers.runner_ssh import SshRunner, SshSettings
from vmsnap_drivers.snapshots.iscsi.address import DEFAULT_PORT, LunAddress, is_at, is_of_this_host
from vmsnap_drivers.snapshots.iscsi.files import Files
from vmsnap_drivers.snapshots.iscsi.lio import Lio
from vmsnap_drivers.snapshots.iscsi.stores import Origin, Stores
from vmsnap_drivers.snapshots.iscsi.targets import NotAllowed, NotRunning, Target, Targets
from vmsnap_drivers.snapshots.iscsi.tgt import Tgt
from vmsnap_drivers.snapshots.iscsi.thick import ThickVolumes
from vmsnap_drivers.snapshots.iscsi.volumes import Volumes
from vmsnap_drivers.snapshots.iscsi.zvols import Zvols

HERE: Final = "this host"
AUTO: Final = "auto"


@dataclass(frozen=True)
class ServerSettings:
    """What serves targets: `server` is the name of one kind, or `AUTO`, where all kinds are asked."""

    server: str = AUTO
    control_port: int = 0
    chap_user: str = ""


@dataclass(frozen=True)
class Served:
    """All targets of the place that messages call `name`, each with what serves it, at the moment when it was asked."""

    name: str
    targets: tuple[tuple[Targets, Target], ...]

    def serving(self, lun: LunAddress) -> tuple[Targets, Target] | None:
        """What serves a LUN's target, and the target. On this host it must listen at the LUN's portal: another server
        may have a target of that name. An appliance is known by its portals, whatever it sees them as.

        :raises SnapshotError: none of that name listens there, two do, or it cannot be asked
        """
        named = [each for each in self.targets if each[1].name == lun.target]
        found = [each for each in named if self.name != HERE or is_at(lun, each[0].portals_of(each[1]))]
        if named and not found:
            where = ", ".join(sorted({portal for server, target in named for portal in server.portals_of(target)}))
            raise SnapshotError(
                f"{lun.target} of {self.name} is not at {lun.portal}, but at {where or 'no portal'}: what is there is"
                " another's",
                cure="see the options appliances and control_port, or choose --mechanism DISK=qcow2",
            )
        if len(found) > 1:
            both = " and ".join(server.label for server, _ in found)
            raise SnapshotError(f"{both} both serve a target {lun.target} on {self.name}", cure="see the option server")
        return found[0] if found else None

    def has(self, lun: LunAddress) -> bool:
        """Whether that LUN is served.

        :raises SnapshotError: as `serving` and `Target.disk` do
        """
        found = self.serving(lun)
        return found is not None and found[1].disk(lun.lun) is not None

    def by(self, server: Targets) -> list[Target]:
        """Those that one server serves."""
        return [target for each, target in self.targets if each is server]


@dataclass
class Place:
    """One place where targets are served. `name` is what messages call it, `portals` where it is reached; none for this
    host. `servers` are what may serve there.
    """

    name: str
    portals: tuple[str, ...]
    runner: Runner
    settings: ServerSettings
    servers: Mapping[str, Targets] = field(init=False)
    kinds: Mapping[str, Stores] = field(init=False)

    def __post_init__(self) -> None:
        control_port = self.settings.control_port if self.here else 0
        self.servers = {
            server.name: server
            for server in (Tgt(self.runner, control_port), Lio(self.runner, self.settings.chap_user))
            if self.settings.server in (AUTO, server.name)
        }
        # In this order they are asked whose a backing store is.
        self.kinds = {kind.kind: kind(self.runner) for kind in (Files, Zvols, Volumes, ThickVolumes)}

    @property
    def here(self) -> bool:
        """It is this host."""
        return self.name == HERE

    def serving(self, lun: LunAddress) -> tuple[Targets, Target] | None:
        """What serves a LUN's target, and the target.

        :raises SnapshotError: nothing serves here, it cannot be asked, or see `Served.serving`
        :raises DriverUnavailable: the programs are not installed by which it could be
        """
        return self.served().serving(lun)

    def served(self) -> Served:
        """All targets, asked for once. Raises as `all_targets` does."""
        return Served(self.name, tuple(self.all_targets()))

    def all_targets(self) -> Iterator[tuple[Targets, Target]]:
        """All targets, each with what serves it.

        :raises SnapshotError: nothing serves here, or it cannot be asked
        :raises DriverUnavailable: the programs are not installed by which it could be, or we may not ask
        """
        silent: list[NotRunning | DriverUnavailable] = []
        asked = [server for server in self.servers.values() if not self.here or server.is_on_this_host()]
        if not asked:
            raise NotRunning(f"nothing serves targets on {self.name}", cure="start it, and see that vmsnap may tell it")
        for server in asked:
            try:
                if self.here and (refusal := server.refusal()):
                    raise refusal
                targets = server.targets()
            except (NotRunning, DriverUnavailable) as e:
                silent.append(e)
                continue
            yield from ((server, target) for target in targets)
        if len(silent) == len(asked):
            if closed := next((e for e in silent if isinstance(e, NotAllowed)), None):
                raise closed
            reasons = dict.fromkeys(e.message for e in silent)
            raise type(silent[0])(f"nothing serves targets on {self.name}: {'; '.join(reasons)}", cure=silent[0].cure)

    def allowed(self) -> list[Targets]:
        """What may serve here, without what is on this host and may not be told by us. Quick."""
        return [server for server in self.servers.values() if not self.here or server.refusal() is None]

    def origins(self) -> list[str]:
        """The paths of all backing stores; raises as `all_targets` does."""
        return [lun.path for _, target in self.all_targets() for lun in target.disks if lun.path.startswith("/")]

    def look(self, path: str) -> Origin:
        """What lies at the path of a backing store.

        :raises SnapshotError: it is not there, or cannot be snapshotted
        """
        for stores in self.kinds.values():
            if (origin := stores.look(path)) is not None:
                return origin
        raise SnapshotError(f"{path} on {self.name} is of no kind that can be snapshotted")


def no_lun(place: Place, lun: LunAddress) -> str:
    """What is said where a LUN is not served."""
    return f"{place.name} serves no LUN {lun.lun} of {lun.target}"


class Places:
    """All of them that are configured, made when they are asked for."""

    def __init__(self, appliances: str, servers: ServerSettings, ssh: SshSettings) -> None:
        """Remember what is configured; no I/O.

        :raises UsageError: it is none
        """
        self._servers = servers
        self._settings = ssh
        self._urls = dict(_entry(word) for word in appliances.replace(",", " ").split())
        self._made: dict[str, Place] = {}

    def serves(self, lun: LunAddress) -> bool:
        """Whether its portal is one of an appliance that is configured, or of this host, which serves, be it ours to
        tell or not. Quick.
        """
        if lun.portal in self._urls:
            return True
        return bool(self._here()) and is_of_this_host(lun.host)

    def refusals(self) -> list[NotAllowed]:
        """Why what serves on this host may not be told by us; nothing where it may. Quick."""
        return [refusal for server in self._here() if (refusal := server.refusal())]

    def check_usable(self) -> None:
        """See that there is a place that may be told. Quick, asks nobody.

        :raises DriverUnavailable: there is none
        """
        if any(self.all()):
            return
        if refusals := self.refusals():
            raise refusals[0]
        raise DriverUnavailable(
            "nothing serves targets on this host, and no appliance is configured",
            cure="start tgtd or set up LIO, or see the option appliances",
        )

    def _here(self) -> list[Targets]:
        """What serves on this host."""
        return [server for server in self.of("").servers.values() if server.is_on_this_host()]

    def of(self, portal: str) -> Place:
        """The place behind a portal; this host for none.

        :raises SnapshotError: it is no portal of this host, nor of an appliance that is configured, or is any more
        """
        url = self._urls.get(portal, "")
        if not url and portal and not is_of_this_host(portal.rpartition(":")[0]):
            raise SnapshotError(
                f"{portal} is no portal of this host, nor of an appliance that is known",
                cure="see the option appliances",
            )
        if url not in self._made:
            if url:
                portals = tuple(each for each, known in self._urls.items() if known == url)
                self._made[url] = Place(f"the appliance {url}", portals, SshRunner(url, self._settings), self._servers)
            else:
                self._made[url] = Place(HERE, (), LocalRunner(), self._servers)
        return self._made[url]

    def all(self) -> Iterator[Place]:
        """This host where it serves and may be told, and all appliances."""
        if len(self.refusals()) < len(self._here()):
            yield self.of("")
        for portal in {url: portal for portal, url in self._urls.items()}.values():
            yield self.of(portal)

    def close(self) -> None:
        """Let go of connections; idempotent."""
        for place in self._made.values():
            place.runner.close()
        self._made.clear()


def _entry(word: str) -> tuple[str, str]:
    portal, equals, url = word.partition("=")
    if not equals or not portal or not url.startswith("ssh://"):
        raise UsageError(
            f"appliances: {word!r} names no appliance", cure="write it as PORTAL=ssh://USER@HOST, several with spaces"
        )
    has_port = portal.rpartition(":")[2].isdecimal() and not portal.endswith("]")
    return (portal if has_port else f"{portal}:{DEFAULT_PORT}"), url
