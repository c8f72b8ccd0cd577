"""A guest for what the kernel of this host cannot do, without an emulated processor: Debian's user-mode Linux, a kernel
that is a process. It has device mapper, LIO, Linux' own initiator and XFS, and runs programs several times faster than
QEMU does where there is no KVM; it has no network.
"""

from .qemus import unpacked
from .scripted_guest import CHECKOUT, INIT, MEMORY_MIB, ScriptedGuest


class UserModeGuest(ScriptedGuest):
    """One such guest."""

    def _command(self, port: int) -> list[str]:
        root = unpacked("user-mode-linux", "user-mode Linux")
        (modules,) = (root / "usr/lib/uml/modules").iterdir()
        # fmt: off
        return [
            str(root / "usr/bin/linux.uml"), f"mem={MEMORY_MIB}M", "rootfstype=hostfs", "rootflags=/", "ro",
            f"init={INIT / 'user-mode-init'}", f"uml_dir={self.folder}", "umid=guest", "quiet", "panic=-1",
            "con=null", "con0=null,fd:1", f"con1=fd:{port}",
            # What the kernel does not know itself is a variable of init's.
            f"CHECKOUT={CHECKOUT}", f"RESULTS={self.results}", f"MODULES={modules}",
            f"PACKAGES={unpacked('storage', 'device mapper') / 'root'}",
        ]
        # fmt: on
