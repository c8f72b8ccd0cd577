"""The console script ``vmsnap``: which commands there are, and where. Imports nothing that a command needs."""

from __future__ import annotations

from vmsnap import __version__
from vmsnap.cli.lazy import CommandLine, LazyCommand
from vmsnap.cli.version import version_option

BEGIN = "Begin"
BACKUPS = "Backups"
CARE = "Care"
SERVICE = "Service"

COMMANDS = {
    "demo": LazyCommand("vmsnap.cli.demo:demo", "See the whole story on a simulated VM, in under a minute.", BEGIN),
    "init": LazyCommand("vmsnap.cli.init:init", "Make a repository.", BEGIN),
    "vm": LazyCommand("vmsnap.cli.vm:vm", "Register VMs, list them, remove them.", BEGIN),
    "backup": LazyCommand("vmsnap.cli.backup:backup", "Back up a running VM whole: RAM, vCPUs and disks.", BACKUPS),
    "list": LazyCommand("vmsnap.cli.listing:list_backups", "List the backups.", BACKUPS),
    "show": LazyCommand("vmsnap.cli.listing:show", "Show one backup with its evidence.", BACKUPS),
    "restore": LazyCommand("vmsnap.cli.restore:restore", "Bring a backup up as a new VM.", BACKUPS),
    "consolidate": LazyCommand("vmsnap.cli.consolidate:consolidate", "Get clean disks from a live backup.", BACKUPS),
    "duplicate": LazyCommand("vmsnap.cli.duplicate:duplicate", "List and discard duplicates in memory.", BACKUPS),
    "failover": LazyCommand("vmsnap.cli.duplicate:failover", "Let a duplicate take a failed VM's place.", BACKUPS),
    "export": LazyCommand("vmsnap.cli.export:export", "Write a backup's disks as image files.", BACKUPS),
    "copy": LazyCommand("vmsnap.cli.copy:copy", "Copy backups into another repository.", BACKUPS),
    "prune": LazyCommand("vmsnap.cli.prune:prune", "Remove the backups that no rule keeps.", BACKUPS),
    "forget": LazyCommand("vmsnap.cli.prune:forget", "Remove single backups.", BACKUPS),
    "verify": LazyCommand("vmsnap.cli.integrity:verify", "Read and authenticate all of one backup, or boot it.", CARE),
    "check": LazyCommand("vmsnap.cli.integrity:check", "Check the repository.", CARE),
    "repair": LazyCommand("vmsnap.cli.integrity:repair", "Save what can be saved of a damaged repository.", CARE),
    "key": LazyCommand("vmsnap.cli.key:key", "Add, list, remove and change passphrases.", CARE),
    "gc": LazyCommand("vmsnap.cli.collect:gc", "Free the room of what no backup needs.", CARE),
    "doctor": LazyCommand("vmsnap.cli.doctor:doctor", "Say what works on this host, and what is missing.", CARE),
    "drivers": LazyCommand("vmsnap.cli.drivers:drivers", "List the installed drivers, show their options.", CARE),
    "log": LazyCommand("vmsnap.cli.log:log", "Show what was done, a line an instruction.", CARE),
    "recover": LazyCommand("vmsnap.cli.recover:recover", "Finish or undo what a crash left.", CARE),
    "strays": LazyCommand("vmsnap.cli.strays:strays", "Find what nobody answers for after a loss of state.", CARE),
    "agent": LazyCommand("vmsnap.cli.agent:agent", "Run as a service: schedules, an API, a page.", SERVICE),
    "schedule": LazyCommand("vmsnap.cli.schedule:schedule", "Say what the agent does, and when.", SERVICE),
    "jobs": LazyCommand("vmsnap.cli.jobs:jobs", "Show what the agent does and has done.", SERVICE),
}
"""The commands of every console script that works with VMs."""

vmsnap = CommandLine(
    "vmsnap",
    COMMANDS,
    params=[version_option(__version__)],
    help="Back up running virtual machines whole - RAM, vCPUs and every disk from one instant - and bring them back.",
    epilog="""\
        vmsnap demo
        vmsnap init -r /srv/backups
        vmsnap vm add web1 --hypervisor qemu -o qmp=/run/web1.qmp
        vmsnap backup web1 -r /srv/backups
        vmsnap restore web1-20260101T120000Z-1a2b3c --as web1-copy --run -r /srv/backups""",
)
"""The entry point."""
