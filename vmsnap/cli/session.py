"""What every command shares: the options of all commands, the configuration, and how controller and repository are
opened from them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from vmsnap.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from vmsnap.configuration import Configuration
    from vmsnap.controller import Controller
    from vmsnap.host import HostFolders
    from vmsnap.ratelimit import RateLimit
    from vmsnap.repository import Repository
    from vmsnap.roles import StorageBackend


_CHUNK_CACHE_BYTES = 1 << 30


def quit_at_once(signal_name: str) -> NoReturn:
    """End this process without cleaning up, as a second signal asks for. The guardian sees to the guest."""
    os.write(2, f"vmsnap: stopped at once by a second signal, {signal_name} (run: vmsnap recover)\n".encode())
    os._exit(Interrupted.exit_code)


@dataclass
class Session:
    """One call of a console script. `hypervisor` is preset by the scripts of one backend."""

    program: str = "vmsnap"
    hypervisor: str | None = None
    repository: str | None = None
    storage_options: dict[str, str] = field(default_factory=dict)
    state_dir: Path | None = None
    config: Path | None = None
    json: bool = False
    debug: bool = False
    limits: tuple[RateLimit, RateLimit] | None = None
    limit_rate_bytes: int | None = None
    agent: str | None = None

    @cached_property
    def configuration(self) -> Configuration:
        """The configuration file, read when it is first needed.

        :raises UsageError: it is wrong
        """
        from vmsnap.configuration import load

        return load(self.config)

    def folders(self) -> HostFolders:
        """The host's folders, by ``--state-dir``, ``VMSNAP_STATE_DIR``, the configuration, or the default."""
        from vmsnap.host import HostFolders

        configured = self.configuration
        state_dir = self.state_dir
        if state_dir is None and not os.environ.get("VMSNAP_STATE_DIR"):
            state_dir = configured.state_dir
        return HostFolders.find(
            state_dir,
            spool_dir=configured.spool_dir,
            memory_budget_bytes=configured.memory_budget_bytes,
            duplicates_dir=configured.duplicates_dir,
        )

    @contextmanager
    def controller(self) -> Iterator[Controller]:
        """The controller of this host's state."""
        from vmsnap.controller import Controller, Drivers

        folders = self.folders()
        drivers = Drivers(folders.context(), self.configuration.mechanism_options)
        with Controller(folders, drivers=drivers) as controller:
            controller.interruption.second = quit_at_once
            yield controller

    def repository_url(self) -> str:
        """The repository by ``-r``, ``VMSNAP_REPOSITORY`` or the configuration.

        :raises UsageError: none of them names one, or it has a password in it
        """
        url = self.named_repository()
        if not url:
            raise UsageError(
                "no repository was named",
                cure="give -r URL, set VMSNAP_REPOSITORY, or write 'repository' into the configuration file",
            )
        return url

    def named_repository(self) -> str | None:
        """The same; None where none of them names one.

        :raises UsageError: it has a password in it
        """
        from vmsnap.places import refuse_secrets

        url = self.repository or os.environ.get("VMSNAP_REPOSITORY") or self.configuration.repository
        if url:
            refuse_secrets(url)
        return url

    def options_of_storage(self, url: str) -> dict[str, str]:
        """The options for the storage backend of `url`: the configuration's, and over them those that were given."""
        from vmsnap.places import scheme_of

        return {**self.configuration.storage_options.get(scheme_of(url), {}), **self.storage_options}

    def storage(self) -> StorageBackend:
        """The storage backend of the repository's URL; no I/O.

        :raises DriverUnavailable: no backend serves it
        :raises UsageError: the URL or an option is wrong
        """
        from vmsnap.places import storage_for

        url = self.repository_url()
        return storage_for(url, self.options_of_storage(url))

    def open_repository(self) -> Repository:
        """Open the repository; the passphrase is looked for only when it is encrypted.

        :raises NotARepository: there is none
        :raises UsageError: no repository or passphrase was given, or the passphrase is wrong
        """
        return self.open_place(self.repository_url())

    def open_place(self, url: str, variable: str = "") -> Repository:
        """Open the repository at `url`, as `open_repository`.

        :param variable: holds its passphrase, where it has one of its own
        """
        from vmsnap.host import default_cache_dir
        from vmsnap.places import open_repository
        from vmsnap.secret import from_environment

        def passphrase() -> str:
            own = from_environment(variable, "passphrase") if variable else None
            return self.passphrase(url if variable else "") if own is None else own

        cache_dir = None if os.environ.get("VMSNAP_CACHE_DIR") else self.configuration.cache_dir
        cache_dir = (cache_dir or default_cache_dir()).absolute()
        options = self.options_of_storage(url)
        repository = open_repository(url, passphrase, options, cache_dir=cache_dir, limits=self.limits)
        size = self.configuration.chunk_cache_bytes
        repository.chunk_cache_bytes = _CHUNK_CACHE_BYTES if size is None else size
        repository.compression_level = self.configuration.compression_level
        return repository

    def passphrase(self, url: str = "") -> str:
        """The passphrase of the repository, from wherever the user keeps it, at last from a prompt.

        :param url: which one it is, where there are several
        :raises UsageError: there is none and nobody can be asked
        """
        from vmsnap.cli.passphrase import ask, find_passphrase

        found = find_passphrase(self.configuration)
        return ask(url) if found is None else found

    def new_passphrase(self) -> str:
        """The passphrase that is to open the repository from now on, at last from a prompt.

        :raises UsageError: there is none and nobody can be asked
        """
        from vmsnap.cli.passphrase import new_passphrase

        return new_passphrase()

    def emit(self, document: object, people: Callable[[], None]) -> None:
        """Report: `document` as JSON with ``--json``, else whatever `people` writes."""
        if not self.json:
            people()
            return
        import json

        # ASCII, so that any byte a path can hold comes through whatever the locale is.
        click.echo(json.dumps(document, indent=2))

    def note(self, text: str) -> None:
        """A message for people, beside the report: on standard error."""
        from vmsnap.cli.failures import one_line

        click.echo(f"{self.program}: {one_line(text)}", err=True)


pass_session = click.make_pass_decorator(Session)


def _keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    # Given before or after the subcommand; the later one counts, and an absent one takes nothing back.
    session = ctx.find_object(Session)
    if session is not None and value is not None and value is not False:
        setattr(session, str(parameter.name), value)
    if os.environ.get("NO_COLOR"):
        ctx.color = False


def keep_storage_options(ctx: click.Context, parameter: click.Parameter, values: Sequence[str]) -> None:
    """Add options of the storage backend, ``KEY=VALUE`` each, to the session; the later one counts."""
    session = ctx.ensure_object(Session)
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{text!r} is not KEY=VALUE", cure=f"write {parameter.opts[0]} KEY=VALUE")
        session.storage_options[key] = value


def _session_options() -> list[click.Option]:
    common: dict[str, Any] = {"expose_value": False, "callback": _keep}
    return [
        click.Option(
            ["-r", "--repository"],
            metavar="URL",
            help="Where the backups are: file:///path or a plain path. [env: VMSNAP_REPOSITORY]",
            **common,
        ),
        click.Option(
            ["--storage-option"],
            metavar="KEY=VALUE",
            multiple=True,
            expose_value=False,
            callback=keep_storage_options,
            help="An option of the storage backend; see: vmsnap drivers show s3.",
        ),
        click.Option(
            ["--state-dir"],
            metavar="DIR",
            type=click.Path(path_type=Path),
            help="VM table, journal and spool of this host. [env: VMSNAP_STATE_DIR]",
            **common,
        ),
        click.Option(
            ["--config"],
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="Configuration file. [env: VMSNAP_CONFIG]",
            **common,
        ),
        click.Option(["--json"], is_flag=True, help="Report as one JSON document on standard output.", **common),
        click.Option(["--debug"], is_flag=True, help="Show tracebacks of errors.", **common),
    ]


class SessionCommand(click.Command):
    """A command that takes the options of all commands, shown below its own."""

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self._own = list(self.params)
        self.params = [*self.params, *_session_options()]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Its own options first, then those of all commands."""
        every = [parameter for parameter in self.get_params(ctx) if parameter not in self._own]
        for heading, parameters in (("Options", self._own), ("Options of every command", every)):
            records = [p.get_help_record(ctx) for p in parameters if isinstance(p, click.Option)]
            rows = [record for record in records if record is not None]
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, each on its own line as it is typed."""
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line.strip()}\n")


class DriverCommand(SessionCommand):
    """A command that takes ``-o``: where the driver is preset, its options are shown."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The driver's options, then the examples."""
        write_driver_options(ctx, formatter)
        super().format_epilog(ctx, formatter)


def write_driver_options(ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the options of the driver that the console script presets; nothing where it presets none."""
    session = ctx.find_object(Session)
    if session is None or session.hypervisor is None:
        return
    from vmsnap import registry

    write_options(formatter, session.hypervisor, registry.hypervisor)


def write_options(formatter: click.HelpFormatter, name: str, find: Callable[[str], type[Any]]) -> None:
    """Write the options of the driver that `find` finds by its name, or why it cannot be used."""
    from vmsnap.cli.drivers import option_rows
    from vmsnap.errors import DriverUnavailable

    with formatter.section(f"Options of the driver {name}"):
        try:
            rows = option_rows(find(name))
        except DriverUnavailable as e:
            formatter.write_text(str(e))
            return
        if rows:
            formatter.write_dl(rows)
        else:
            formatter.write_text("It has none.")


class SessionGroup(SessionCommand, click.Group):
    """A group that takes the options of all commands; its commands do so too."""

    command_class = SessionCommand
    group_class = type

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options and commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)
