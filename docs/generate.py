"""Writes the pages that are made of the program itself, below docs/generated: the commands, the drivers' options, the
contracts' scenarios. Sphinx does it before it reads (docs/conf.py): none of them is kept, and none is ever stale.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from vmsnap.cli.drivers import option_rows
from vmsnap.cli.main import vmsnap
from vmsnap.registry import installed
from vmsnap.testing.hypervisor import HypervisorContract
from vmsnap.testing.snapshot import SnapshotContract
from vmsnap.testing.storage import StorageContract

SUITES: dict[str, type[Any]] = {
    "Hypervisor": HypervisorContract,
    "SnapshotMechanism": SnapshotContract,
    "StorageBackend": StorageContract,
}
"""The contract suite of each role."""
_SCENARIO = re.compile(r"test_(\d+)_(\w+)")


def scenarios(suite: type[Any]) -> list[tuple[int, str, str]]:
    """Number, title and sentence of all scenarios of a suite, in the order of their numbers."""
    found = []
    for name in dir(suite):
        match = _SCENARIO.fullmatch(name)
        if match is not None:
            sentence = " ".join((getattr(suite, name).__doc__ or "").split())
            found.append((int(match[1]), match[2].replace("_", " "), sentence))
    return sorted(found)


def contract_page() -> str:
    """The scenarios of all roles."""
    lines = [
        "# The contracts, scenario by scenario",
        "",
        "What a driver is held to. Each scenario is a test of the suite that driver authors inherit, `test_` and its",
        "number; it quotes the sentence of the [role](../roles.md) that it tests, or says it in other words. A failure",
        "shows the same line.",
    ]
    for role, suite in SUITES.items():
        lines += ["", f"## {role}", "", f"`{suite.__module__}.{suite.__name__}`"]
        for number, title, sentence in scenarios(suite):
            lines += ["", f"{number:02d}", f": **{title}**: {sentence}"]
    return "\n".join([*lines, ""])


def commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Context]]:
    """A command and all below it."""
    context = click.Context(command, info_name=" ".join(path))
    yield path, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from commands(below, (*path, name))


def commands_page() -> str:
    """The help of every command."""
    lines = [
        "# Commands",
        "",
        "What `vmsnap COMMAND --help` says, from the same source; `man vmsnap` has it too (`make man`).",
        "",
        'Completion of commands and options on TAB: `eval "$(_VMSNAP_COMPLETE=bash_source vmsnap)"` in `~/.bashrc`;',
        "`zsh_source` and `fish_source` for other shells.",
    ]
    for path, context in commands(vmsnap, ("vmsnap",)):
        level = "##" if len(path) < 3 else "###"
        help_text = context.command.get_help(context).rstrip()
        # the same options after each command would be most of the page
        if len(path) > 1:
            help_text = re.sub(r"\n\nOptions of every command:\n(?:  .*\n?)+", "\n", help_text).rstrip()
        lines += ["", f"{level} {' '.join(path)}", "", "```text", help_text, "```"]
    return "\n".join([*lines, ""])


def drivers_page() -> str:
    """The options of the drivers that come with vmsnap."""
    lines = [
        "# Drivers and their options",
        "",
        "What `vmsnap drivers show NAME` says of the drivers that come with vmsnap.",
    ]
    for found in installed():
        if found.distribution != "vmsnap" or found.driver is None:
            continue
        about = " ".join((found.driver.__doc__ or "").strip().partition("\n\n")[0].split())
        lines += ["", f"## {found.kind} {found.name}", "", about.replace("``", "`"), ""]
        rows = option_rows(found.driver)
        lines += ["| option | meaning |", "|---|---|"] if rows else ["It has no options."]
        lines += [f"| `{option}` | {meaning} |" for option, meaning in map(_cells, rows)]
    return "\n".join([*lines, ""])


def _cells(row: tuple[str, str]) -> tuple[str, str]:
    option, meaning = (text.replace("|", r"\|").replace("<", r"\<") for text in row)
    return option.replace(r"\<", "<"), meaning


def write(folder: Path) -> None:
    """Write all pages; files that are right already stay as they are."""
    folder.mkdir(exist_ok=True)
    for name, page in (("contract", contract_page()), ("commands", commands_page()), ("drivers", drivers_page())):
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text() != page:
            path.write_text(page)
