"""A command line in the making: its arguments keep their numbers while some are dropped, changed and added. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from vmsnap_drivers.qemu.commandline import Argument


class Options:
    """The arguments, each under the number that it had or got."""

    def __init__(self, arguments: Sequence[Argument]) -> None:
        self._arguments: list[Argument | None] = list(arguments)

    def __getitem__(self, number: int) -> Argument:
        argument = self._arguments[number]
        if argument is None:
            raise KeyError(number)
        return argument

    def items(self, *names: str) -> list[tuple[int, Argument]]:
        """Those that are there, with their numbers; only options of these names where some are given."""
        return [
            (number, argument)
            for number, argument in enumerate(self._arguments)
            if argument is not None and (not names or argument.name in names)
        ]

    def named(self, option: str, key: str) -> dict[str, int]:
        """The numbers of the options of one name by one of their properties, where they have it."""
        found = {argument.properties.get(key): number for number, argument in self.items(option)}
        found.pop("", None)
        return found

    def replace(self, number: int, argument: Argument) -> None:
        """Put another argument in the place of one."""
        self._arguments[number] = argument

    def drop(self, number: int) -> None:
        """Leave one out."""
        self._arguments[number] = None

    def add(self, argument: Argument) -> int:
        """Add one at the end and return its number."""
        self._arguments.append(argument)
        return len(self._arguments) - 1

    def settled(self) -> tuple[list[Argument], dict[int, int]]:
        """The arguments that are left, and for each number here its place among them."""
        left = self.items()
        return [argument for _, argument in left], {number: place for place, (number, _) in enumerate(left)}
