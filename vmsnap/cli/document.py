"""Shows people a report that came as JSON: what an agent's job said, whatever its verb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import click

from vmsnap.cli import output


def show_document(document: Any) -> None:
    """Write a JSON document as fields and tables; sizes and times as everywhere."""
    if isinstance(document, Mapping):
        _show_mapping(document)
    elif isinstance(document, Sequence) and not isinstance(document, str):
        _show_list(document)
    elif document is not None:
        click.echo(output.printable(_text("", document)))


def _show_mapping(found: Mapping[str, Any]) -> None:
    short = [(_heading(key), _text(key, value)) for key, value in found.items() if not _is_table(value)]
    if short:
        output.fields(short)
    for key, value in found.items():
        if _is_table(value):
            click.echo(f"\n{_heading(key)}:")
            _show_list(value)


def _show_list(found: Sequence[Any]) -> None:
    if not _is_table(found):
        for each in found:
            click.echo(output.printable(_text("", each)))
        if not found:
            click.echo("none")
        return
    keys = list(dict.fromkeys(key for row in found for key in row))
    numbers = [_heading(key) for key in keys if key.endswith(("_bytes", "seconds"))]
    rows = [[_text(key, row.get(key)) for key in keys] for row in found]
    output.table([_heading(key) for key in keys], rows, right=numbers)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _heading(key: str) -> str:
    return key.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")


def _text(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _amount(key, value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_text(name, each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(_text(key, each) for each in value)
    return output.local_time(value) if _is_time(value) else str(value)


def _amount(key: str, value: float) -> str:
    if key.endswith("_bytes"):
        return output.size(value)
    if key == "pause_seconds":
        return output.milliseconds(value)
    return f"{value:.1f} s" if key.endswith("seconds") else str(value)


def _is_time(text: str) -> bool:
    if not text.endswith("Z"):
        return False
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
