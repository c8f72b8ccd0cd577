"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from vmsnap.configuration import parse_duration, parse_size
from vmsnap.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def size_option(*declaration: str, default: str, help: str) -> Callable[[F], F]:
    """An option that takes a size such as ``64M``, as bytes."""

    def convert(ctx: click.Context, parameter: click.Parameter, value: str) -> int:
        return parse_size(value)

    return click.option(*declaration, metavar="SIZE", default=default, show_default=True, callback=convert, help=help)


def duration_option(*declaration: str, help: str) -> Callable[[F], F]:
    """An option that takes a duration such as ``30d``, as seconds; None where it is not given."""

    def convert(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
        return None if value is None else parse_duration(value)

    return click.option(*declaration, metavar="DURATION", callback=convert, help=help)


def limit_rate(function: F) -> F:
    """``--limit-rate RATE``, which counts for every repository that the command opens."""

    def keep(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is None:
            return
        from vmsnap.cli.session import Session
        from vmsnap.ratelimit import RateLimit

        rate = parse_size(value.removesuffix("/s"))
        if rate < 1:
            raise UsageError(f"{value!r} lets nothing through", cure="write --limit-rate 10M")
        session = ctx.ensure_object(Session)
        session.limit_rate_bytes, session.limits = rate, (RateLimit(rate), RateLimit(rate))

    return click.option(
        "--limit-rate",
        metavar="RATE",
        expose_value=False,
        callback=keep,
        help="Bytes in a second, such as 10M, to move at most to the repository, and as many from it.",
    )(function)


def driver_options(function: F) -> F:
    """``-o key=value``, any number of times, as the argument `options`, a dict."""
    return click.option(
        "-o",
        "options",
        metavar="KEY=VALUE",
        multiple=True,
        callback=_pairs,
        help="An option of the driver; see: vmsnap drivers show NAME.",
    )(function)


def accept_loss(function: F) -> F:
    """``--accept-loss``, a flag, as the argument `accept_loss`."""
    return click.option(
        "--accept-loss", is_flag=True, help="Take zeros for what vmsnap repair has noted as lost; else it is refused."
    )(function)


def mechanism_choices(function: F) -> F:
    """``--mechanism DISK=NAME``, any number of times, as the argument `mechanisms`, a dict."""
    return click.option(
        "--mechanism",
        "mechanisms",
        metavar="DISK=NAME",
        multiple=True,
        callback=_mechanisms,
        help="The snapshot mechanism for one disk; without it the first that can is chosen.",
    )(function)


def shutdown_timeout(function: F) -> F:
    """``--timeout SECONDS``, as the argument `timeout`."""
    return click.option(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=300.0,
        show_default=True,
        help="How long the guest may take to shut down.",
    )(function)


def _pairs(ctx: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in values:
        key, equals, value = text.partition("=")
        _add(found, key, equals, value, text, "-o key=value")
    return found


def _mechanisms(ctx: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in values:
        # A device may hold "=", a mechanism's name never does.
        device, equals, name = text.rpartition("=")
        _add(found, device, equals, name, text, "--mechanism DISK=NAME")
    return found


def _add(found: dict[str, str], key: str, equals: str, value: str, text: str, shape: str) -> None:
    if not equals or not key:
        raise UsageError(f"{text!r} is not {shape}")
    if key in found:
        raise UsageError(f"{key!r} is given twice", cure=f"give {shape} once for each")
    found[key] = value
