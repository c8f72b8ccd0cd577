"""Carries one protocol out: asks the table what may follow, writes the journal before and after, sets things right
on failure.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from vmsnap.controller.interruption import Interruption
from vmsnap.errors import ProtocolError, VmsnapError
from vmsnap.journal import Deed, Operation
from vmsnap.protocol import Compensation, Condition, Instruction, Protocol, State

Action = Callable[[], object]
"""Carries out an instruction or a compensation. Text that it returns is what the journal says of it."""

_CURES: Final = {
    errno.ENOSPC: "free some room there",
    errno.EDQUOT: "free some room there, or raise the quota",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.ENFILE: "raise the limit of open files: sysctl fs.file-max",
    errno.ENOMEM: "free some memory",
    errno.EIO: "look into the kernel's log: the disk may be failing",
}


class Execution:
    """One run of `protocol`.

    `actions` carry the instructions out, `compensations` set things right; both come from the operation at hand (a
    backup, a restore). `holds` answers the protocol's conditions when they are met. Of several allowed
    instructions those in `prefer` are given first.
    """

    def __init__(
        self,
        protocol: Protocol,
        operation: Operation,
        vm: str,
        *,
        actions: Mapping[Instruction, Action],
        compensations: Mapping[Compensation, Action],
        holds: Callable[[Condition], bool],
        interruption: Interruption,
        prefer: Sequence[Instruction] = (),
    ) -> None:
        self.state = protocol.start
        self._protocol = protocol
        self._operation = operation
        self._vm = vm
        self._actions = actions
        self._compensations = compensations
        self._holds = holds
        self._interruption = interruption
        self._prefer = tuple(prefer)
        self._begun: list[Instruction] = []

    def run(self) -> None:
        """Go from start to goal. Blocks.

        :raises VmsnapError: an instruction failed; everything that was begun has been set right, or stands in the
            journal
        """
        try:
            while self.state is not self._protocol.goal:
                instruction = self._choose()
                if instruction in self._protocol.window:
                    self._run_window()
                else:
                    self._interruption.raise_pending()
                    self._give(instruction)
        except BaseException as error:
            self._set_right(error)
            raise
        self._operation.end("done")

    def _run_window(self) -> None:
        """All instructions of the pause window in one go, with signals deferred and no write to the journal in
        between.
        """
        executing = self._holds(Condition.EXECUTING)
        with self._interruption.deferred():
            self._operation.open_window(
                (instruction.value for instruction in self._window_order()), self._vm, executing=executing
            )
            while self.state is not self._protocol.goal:
                instruction = self._choose()
                if instruction not in self._protocol.window:
                    break
                self._give(instruction)
            # Where an instruction failed the guest comes first, and the journal is written after it: `_set_right`.
            self._operation.close_window()

    def _window_order(self) -> list[Instruction]:
        order, state = [], self.state
        while state is not self._protocol.goal:
            instruction = self._choose(state)
            if instruction not in self._protocol.window:
                break
            order.append(instruction)
            state = self._protocol.after(state, instruction)
        return order

    def _choose(self, state: State | None = None) -> Instruction:
        allowed = self._protocol.allowed(state or self.state)
        if not allowed:
            raise ProtocolError(f"protocol {self._protocol.name!r} has no way out of state {self.state.value!r}")
        return next((instruction for instruction in self._prefer if instruction in allowed), allowed[0])

    def _give(self, instruction: Instruction) -> None:
        condition = self._protocol.conditions.get(instruction)
        self._operation.begun(instruction.value)
        if condition is not None and not self._holds(condition):
            self._operation.ended(instruction.value, "passed over", f"not so: {condition.value}")
        else:
            self._begun.append(instruction)
            try:
                told = self._actions[instruction]()
            except OSError as error:
                failed = _named(instruction, error)
                self._enter_failure(instruction, failed)
                raise failed from error
            except BaseException as error:
                self._enter_failure(instruction, error)
                raise
            self._operation.ended(instruction.value, "done", _text(told))
        self.state = self._protocol.after(self.state, instruction)

    def _enter_failure(self, instruction: Instruction, error: BaseException) -> None:
        try:
            self._operation.ended(instruction.value, "failed", str(error))
        except VmsnapError as left:
            error.add_note(f"the journal could not be written: {left}")

    def _set_right(self, error: BaseException) -> None:
        """Do what the table says for what was begun, all of it even where some fails; what fails stays in the
        journal.
        """
        deeds = []
        with self._interruption.deferred(quietly=True):
            for compensation in self._protocol.to_undo(self._begun):
                begun_ns, status, message = time.time_ns(), "done", ""
                try:
                    message = _text(self._compensations[compensation]())
                except Exception as left:  # noqa: BLE001 - one failure must not keep the others from being done
                    error.add_note(f"while it was tried to {compensation.value}: {left}")
                    status, message = "failed", str(left)
                deeds.append(Deed(compensation.value, status, message, begun_ns, time.time_ns()))
            try:
                self._operation.close_window()
                self._operation.did(*deeds)
                self._operation.end("failed")
            except VmsnapError as left:
                error.add_note(f"the journal could not be written: {left}")


def _named(instruction: Instruction, error: OSError) -> VmsnapError:
    """What the system refused a driver or us, where nobody closer to it has said it better."""
    place = f": {error.filename}" if error.filename else ""
    message = f"{instruction.value} failed: {error.strerror or error}{place}"
    return VmsnapError(message, cure=_CURES.get(error.errno or 0, ""))


def _text(told: object) -> str:
    return told if isinstance(told, str) else ""
