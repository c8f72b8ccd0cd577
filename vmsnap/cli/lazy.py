"""Groups of commands that import a command's module only when that command is run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from vmsnap.cli.failures import Stopped, exit_code_of
from vmsnap.cli.session import Session, SessionGroup
from vmsnap.secret import take_from_environment


@dataclass(frozen=True)
class LazyCommand:
    """Where a command is (``module:attribute``), what the help says of it, and under which heading."""

    target: str
    summary: str
    section: str = "Commands"

    def load(self) -> click.Command:
        """Import it."""
        module, _, attribute = self.target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


class CommandLine(SessionGroup):
    """A console script: its commands are lazy, its errors are one line, its exit codes are those of `vmsnap.errors`."""

    def __init__(
        self,
        name: str,
        lazy: Mapping[str, LazyCommand],
        *,
        hypervisor: str | None = None,
        **attributes: Any,
    ) -> None:
        super().__init__(name, no_args_is_help=True, **attributes)
        self._lazy = lazy
        self._hypervisor = hypervisor

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the help."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        found = self._lazy.get(cmd_name)
        return found.load() if found else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that `args` name; a misspelt one is told with the nearest."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            from difflib import get_close_matches

            near = get_close_matches(args[0], self._lazy, n=1)
            if not near:
                raise
            raise click.UsageError(f"no such command {args[0]!r}; did you mean {near[0]!r}?", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands under their headings; nothing is imported for it."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, command in self._lazy.items():
            sections.setdefault(command.section, []).append((name, command.summary))
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an interruption reaches `exit_code_of` as it is."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as e:
            raise Stopped from e

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run as a process: never returns, exits with the code that says how it went."""
        session = Session(program=self.name or "vmsnap", hypervisor=self._hypervisor)
        # Processes that we start (guardians, VMs) have no business with them.
        take_from_environment()
        run = super().main

        def call() -> object:
            return run(args, self.name, complete_var, standalone_mode=False, obj=session, **extra)

        sys.exit(exit_code_of(call, session))
