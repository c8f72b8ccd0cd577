"""Reads the definition of a VM out of a backup, whichever driver stored it."""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec

from vmsnap.errors import HypervisorError
from vmsnap.model import Json


class _Definition(Protocol):
    @property
    def format(self) -> int:
        """The number of its form."""


D = TypeVar("D", bound=_Definition)


def read_definition(content: Json, kind: type[D], form: int) -> D:
    """The definition as one of `kind`.

    :param form: the number of the form that this vmsnap writes
    :raises HypervisorError: it is none of ours
    """
    try:
        definition = msgspec.convert(content, kind, strict=False)
    except msgspec.ValidationError as e:
        raise HypervisorError(f"the definition of the VM is damaged: {e}") from e
    if definition.format != form:
        raise HypervisorError(f"the definition of the VM has format {definition.format}, written by a newer vmsnap")
    return definition
