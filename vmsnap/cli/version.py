"""``--version``: what is installed, from the package itself, without reading any metadata."""

from __future__ import annotations

import click


def version_option(version: str) -> click.Option:
    """The option ``--version`` of a console script."""

    def show(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(f"{ctx.command.name} {version}")
            ctx.exit()

    return click.Option(
        ["--version"], is_flag=True, expose_value=False, is_eager=True, callback=show, help="Show the version and exit."
    )
