"""A real XFS on a loop device, for reflinks."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def mounted_xfs(folder: Path, size_bytes: int = 320 << 20, *, reflink: bool = True) -> Iterator[Path]:
    """Make one in `folder` and mount it; the image is sparse. Needs root and ``mkfs.xfs``.

    :param reflink: without it, it is as those are that were made before 2018
    """
    image, mount = folder / "xfs.img", folder / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mkfs.xfs", "-q", "-m", f"reflink={int(reflink)}", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
