"""The role of a hypervisor driver: pauses, duplicates, resumes one VM, and brings duplicates to life."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vmsnap.errors import CannotCapture, HypervisorError
from vmsnap.model import (
    CapturePlan,
    Disk,
    Duplicate,
    Finding,
    FreezePlan,
    Json,
    Moment,
    Nic,
    OwnedResource,
    RamImage,
    SeenVm,
    VmDescription,
    VmState,
)
from vmsnap.roles.needs import Need
from vmsnap.roles.options import DriverContext, Option

LOOK_EACH_SECONDS = 0.1
"""How often `Hypervisor.await_life` looks, where a driver has nothing better."""


@dataclass(frozen=True)
class CaptureRequest:
    """What the core wants captured: into a duplicate called `duplicate`, the guest standing still
    `max_pause_seconds` at most, in none of the ways `without`, which were tried and did not come to an end.
    """

    duplicate: str
    max_pause_seconds: float
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadRequest:
    """A captured machine to be made to exist again.

    `definition` is what `describe` gave, `images` and `device_state` what `duplicate` gave, with paths valid on
    this host; the files are left as they are, and may be shared by several loads. `disks` are the new VM's own,
    named by the devices of the definition; none of them may belong to another VM. `images_disposable` says that
    nobody else needs the image files: the driver may take them over (use them as the RAM itself); else they are
    mapped copy on write, or read. In either case the caller may unlink them once `load` has returned: a mapping
    keeps its pages without the name. `takeover`: the VM takes the place of one of the same name that was fenced; it
    comes up under that one's name, address (the options of this instance) and MACs, and what the dead process left
    there (stale sockets) is replaced.
    """

    definition: Json
    images: tuple[RamImage, ...]
    device_state: Path
    disks: tuple[Disk, ...]
    isolated: bool = False
    images_disposable: bool = False
    details: Json = None
    takeover: bool = False


@dataclass(frozen=True)
class LoadedVm:
    """A VM that `load` made: the options under which a new driver instance reaches it, and files and folders that
    belong to it (removed by `destroy`).
    """

    vm: str
    options: Mapping[str, str]


class Hypervisor(ABC):
    """One VM of one hypervisor: an instance is made for a VM's name and its checked options, and connects when
    first used.

    The order of a capture, as the core calls it::

        describe → plan_capture → prepare → pause → { disks snapshotted ‖ duplicate } → resume → finish_duplicate
                                     └───────────────┴── on any failure: abandon, then resume if it was executing

    Contract:

    - **The guest goes on.** `resume` makes the VM execute from whatever state `prepare`, `pause` or `duplicate`
      left it in, however they ended, called from this process or another one (the guardian's): it first undoes what
      stands in the way. It is idempotent.
    - **One instant.** The duplicate shows RAM, vCPUs and devices of one moment between the returns of `pause` and
      `resume`. If the VM ran in between for any other reason, `duplicate` or `resume` raises.
    - **Drained.** When `pause` returns, every write that the guest saw completed is in its disks' files (O_DIRECT
      readers see it), and no further one comes until `resume`.
    - **Bounded.** Calls that cannot end are given up within their time-out; none of them needs longer than
      `max_pause_seconds` inside the pause.
    - **Idempotent**: `abandon`, `discard_duplicate`, `destroy`, `cut_network`, `resume`, `close`.
    - Loaded VMs are processes of their own that outlive the caller.
    """

    name: ClassVar[str]
    options: ClassVar[Sequence[Option]] = ()
    needs: ClassVar[Sequence[Need]] = ()
    """Programs and modules without which it does nothing here; ``vmsnap drivers`` names those that are missing."""
    loads_luns: ClassVar[bool] = False
    """`load` takes disks whose address is that of a LUN (``iscsi://``), too."""
    freezes: ClassVar[bool] = False
    """`plan_freeze`, `prepare_freeze`, `freeze_disks`, `check_frozen`, `thaw_disks` and `thaw_owned` work; else they
    raise.
    """

    def __init__(self, vm: str, context: DriverContext, options: Mapping[str, str]) -> None:
        """Remember name, context and checked options; no I/O."""
        self.vm = vm
        self.context = context

    # -- asking

    @abstractmethod
    def describe(self) -> VmDescription:
        """Ask the hypervisor for the definition, memory regions, disks and NICs; disks in the hypervisor's own order.

        What cannot be captured truthfully is told in `refusals`, not raised.

        :raises UnknownVm: no such VM
        :raises Busy: the VM's monitor serves somebody else
        :raises VmGone: it could not be reached, or ended
        """

    @abstractmethod
    def state(self) -> VmState:
        """Ask what the VM does now. A VM that is unknown or gone is `ABSENT`, not an error.

        :raises Busy: the VM's monitor serves somebody else
        :raises HypervisorError: it exists but does not answer; that is not the same as being gone
        """

    @abstractmethod
    def list_vms(self) -> Sequence[str]:
        """Names of the VMs that this driver can see with these options, without being told of them; may be empty."""

    def tags(self) -> Sequence[str]:
        """The tags that its user gave this VM in the hypervisor, for schedules that mean VMs by them: words of
        letters, digits, ``.``, ``_`` and ``-``. None where the hypervisor has no such thing.

        :raises HypervisorError: it could not be asked
        """
        return ()

    def see_vms(self) -> Sequence[SeenVm]:
        """The VMs of `list_vms` with what could be done with each; by default only their names. Changes nothing, and
        touches none of them.
        """
        return [SeenVm(name) for name in self.list_vms()]

    @abstractmethod
    def doctor(self) -> Sequence[Finding]:
        """Look whether this driver works on this host, and for this VM if it exists; name the cure where not.
        Changes nothing.
        """

    # -- capturing

    @abstractmethod
    def plan_capture(self, request: CaptureRequest) -> CapturePlan:
        """Choose the way to capture and predict the pause. No side effects on the VM.

        :raises CannotCapture: the VM cannot be captured truthfully
        :raises StorageFull: no room for the duplicate within the memory budget
        """

    @abstractmethod
    def prepare(self, request: CaptureRequest, plan: CapturePlan) -> None:
        """Do everything slow while the guest runs: folder and files of the duplicate, settings, pre-copying RAM.
        Blocks.

        :raises DoesNotConverge: the guest writes too fast for the planned way, and there is another; the core gives
            this capture up and plans once more, without that way
        :raises CannotCapture: it cannot be
        """

    @abstractmethod
    def pause(self) -> Moment:
        """Stop the vCPUs of a VM that executes (or leave a stopped one stopped), its I/O drained and flushed.

        Returns the moment it stopped, by the hypervisor's own event where it has one.

        :raises PauseExceeded: could not be stopped in time; it runs
        :raises DoesNotConverge: as in `prepare`; it runs
        :raises VmGone: it ended
        """

    @abstractmethod
    def duplicate(self) -> Duplicate:
        """Fix memory, vCPU and device state at this instant, by copy on write or by finishing a pre-copy; copying
        may go on afterwards.

        Called between `pause` and `resume`. Some hypervisors let the guest run again by themselves at the end of it.

        :raises HypervisorError: nothing was fixed; the core calls `abandon` and `resume`
        """

    @abstractmethod
    def resume(self) -> Moment:
        """Make the VM execute, whatever state our calls left it in, and return the moment it did, by the
        hypervisor's own event.

        :raises VmGone: there is no VM any more that could execute
        """

    @abstractmethod
    def finish_duplicate(self, duplicate: Duplicate, progress: Callable[[int], None]) -> Duplicate:
        """Wait until the images and the device state are complete. `progress` is called with the bytes copied so far.

        Returns the duplicate, its details completed. After it the duplicate needs the VM no more.

        :raises HypervisorError: the copy failed; the duplicate is worthless
        """

    @abstractmethod
    def abandon(self) -> None:
        """Give up a capture at any stage: cancel, restore the VM's settings, and remove the files of an unfinished
        duplicate.

        Leaves the execution state alone (`resume` follows where needed). Idempotent; also from another process.
        """

    @abstractmethod
    def discard_duplicate(self, name: str) -> None:
        """Remove the duplicate of that name from host memory; succeeds where there is none."""

    # -- holding disks

    def plan_freeze(self, disks: Sequence[Disk], tag: str) -> FreezePlan:
        """Name all that is made to hold these disks at one instant; see that there is room. No side effects.

        What the guest writes to a disk that is held goes elsewhere, so that the disk's own bytes stay as they are, for
        snapshots which are too slow for the pause::

            plan_freeze → (journal) → prepare_freeze → [pause] → freeze_disks → [resume] → check_frozen … → thaw_disks

        `tag` (``vmsnap-…``) is part of every name. From `freeze_disks` on the guest's newest data are not in its disk,
        so nothing but `thaw_disks`, which brings them there, ever removes what holds them.

        :raises CannotCapture: this driver has `freezes` = False
        :raises VmsnapError: it cannot be done (no room, something stands on a disk); nothing was made
        """
        raise _cannot_freeze(self.name)

    def prepare_freeze(self, plan: FreezePlan) -> None:
        """Do everything slow, the guest running. Blocks.

        :raises VmsnapError: not possible; the core calls `thaw_disks`
        """
        raise _cannot_freeze(self.name)

    def freeze_disks(self, plan: FreezePlan) -> Moment:
        """Hold the disks; called while the guest stands still, its I/O drained and flushed. Returns the moment, between
        the call and its return.

        :raises VmsnapError: failed, or the guest executes; the core calls `thaw_disks`
        """
        raise _cannot_freeze(self.name)

    def check_frozen(self, plan: FreezePlan) -> None:
        """See that the disks are held still and that there is room for what the guest writes. Quick; any number of
        times, between `freeze_disks` and `thaw_disks`.

        :raises VmsnapError: they are not, so that what was read of them is of no instant; or the room is running out
        """
        raise _cannot_freeze(self.name)

    def thaw_disks(self, plan: FreezePlan) -> None:
        """Bring what the guest wrote meanwhile into its disks, connect it to them, and remove all that was made for
        `plan`, whatever of it exists, from whatever step. The guest may run, stand still, or be gone. Idempotent, in
        any process. Blocks.

        :raises VmsnapError: something is left; nothing that the guest wrote is lost, and a later call tries again
        """
        raise _cannot_freeze(self.name)

    def thaw_owned(self, owned: OwnedResource) -> None:
        """Do as `thaw_disks` for something of the kind ``overlay`` that `list_owned` has named, and whose plan nobody
        has any more; the user said so.

        :raises VmsnapError: as `thaw_disks`
        """
        raise _cannot_freeze(self.name)

    # -- bringing back

    def duplicate_options(self) -> Mapping[str, str]:
        """The options for a driver instance that loads a duplicate of this VM beside it, under another name: where the
        hypervisor is (a URI), and nothing that means this VM (its socket). No I/O.
        """
        return {}

    @abstractmethod
    def load(self, request: LoadRequest) -> LoadedVm:
        """Make this instance's VM exist, stopped at the captured instant, on the disks of the request. All or nothing.

        :raises AlreadyExists: a VM of that name (or at that address) exists; with `takeover` one that lives
        :raises HypervisorError: it did not come up; nothing of it is left
        """

    @abstractmethod
    def switch_disks(self, disks: Sequence[Disk]) -> tuple[Disk, ...]:
        """Connect the loaded, stopped VM to `disks`, and ask the hypervisor afterwards: returns the disks as it has
        them now. Those that it has already stay: a restore loads a VM on its disks, and makes sure by this call.

        :raises HypervisorError: a writable disk of the VM is none of `disks`
        """

    @abstractmethod
    def cut_network(self) -> tuple[Nic, ...]:
        """Let no packet pass between the VM and anything else, ask the hypervisor afterwards, and return the NICs,
        none connected.

        :raises HypervisorError: it could not be shown that the network is cut
        """

    @abstractmethod
    def shut_down(self, timeout_seconds: float) -> None:
        """Ask the guest to shut down in order, and wait until it has.

        :raises HypervisorError: the guest did not end in time, or ended in another way
        """

    def fence(self, *, kill: bool = False) -> str:
        """Prove that this VM does not run, and return one line that says how it was shown (its process is gone, nobody
        listens on its socket, …), for the journal and for people.

        With `kill` a VM that lives is killed at once, also one that vmsnap did not load, and its end is waited for.
        Not answering is no proof, being unknown to this driver is none either where the VM could run all the same.
        Idempotent.

        :raises Busy: it lives, and `kill` was not given
        :raises HypervisorError: it cannot be shown that it does not run
        """
        raise HypervisorError(
            f"driver {self.name!r} cannot show that VM {self.vm!r} does not run",
            cure="without that proof nothing takes its place",
        )

    def await_life(self, seconds: float) -> str:
        """Wait until the resumed guest has shown life, and return one line that says how (a heartbeat on its serial
        line, its agent, or executing without fault for `seconds`). Blocks for `seconds` at most.

        :raises HypervisorError: it died, faulted, or does not execute
        """
        deadline = time.monotonic() + seconds
        while True:
            state = self.state()
            if state is not VmState.EXECUTING:
                raise HypervisorError(f"VM {self.vm!r} is {state.value} instead of executing")
            left = deadline - time.monotonic()
            if left <= 0:
                return f"it executed for {seconds:g} s without a fault"
            time.sleep(min(left, LOOK_EACH_SECONDS))

    @abstractmethod
    def destroy(self) -> None:
        """End a VM that `load` made, at once, and remove what `load` made for it (not its disks). Idempotent.

        Refuses VMs that it did not load, with `HypervisorError`.
        """

    @abstractmethod
    def list_owned(self) -> Sequence[OwnedResource]:
        """List everything of this driver on this host that carries our tag: duplicates, loaded VMs."""

    def close(self) -> None:
        """Let go of the connection; idempotent. The VM and its duplicates stay as they are."""


def _cannot_freeze(driver: str) -> CannotCapture:
    return CannotCapture(f"driver {driver!r} cannot hold disks at an instant", cure="back it up without --freeze")
