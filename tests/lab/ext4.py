"""ext4 file systems in raw images, made and looked at with e2fsprogs, never mounted."""

import subprocess
import tempfile
from pathlib import Path


def make_ext4(image: Path, size_bytes: int) -> None:
    """Make a raw image with an empty file system."""
    with image.open("xb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(image)], check=True, capture_output=True)


def needs_recovery(image: Path) -> bool:
    """Whether it was mounted when it was cut off: its journal must be replayed first."""
    answer = subprocess.run(["dumpe2fs", "-h", str(image)], check=True, capture_output=True, text=True).stdout
    features = next(line for line in answer.splitlines() if line.startswith("Filesystem features:"))
    return "needs_recovery" in features


def complaints(image: Path) -> str:
    """What ``e2fsck -fn`` finds wrong, without replaying the journal; empty where all is clean."""
    done = subprocess.run(["e2fsck", "-fn", str(image)], check=False, capture_output=True, text=True)
    return "" if done.returncode == 0 and "skipping journal recovery" not in done.stdout else done.stdout + done.stderr


def replay(image: Path) -> None:
    """Replay the journal, and see that the file system is whole then, as the next mount would."""
    done = subprocess.run(["e2fsck", "-fy", str(image)], check=False, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise ValueError(f"{image} is damaged: {done.stdout}{done.stderr}")


def content_of(image: Path, name: str) -> bytes | None:
    """The content of a file in the root folder; None where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        command = ["debugfs", "-R", f"dump /{name} {copy}", str(image)]
        subprocess.run(command, check=True, capture_output=True)
        return copy.read_bytes() if copy.exists() else None
