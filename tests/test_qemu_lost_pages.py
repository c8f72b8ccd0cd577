"""Which pieces of RAM a pre-copy under TCG loses pages of, by what QEMU says of them."""

from __future__ import annotations

from vmsnap_drivers.qemu.capture.lost_pages import blocks_that_lose

# As QEMU 10.0 prints it; one piece of huge pages, one whose size is no multiple of 256 KiB.
BLOCKS = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                   memfd    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000 0x00007fedcfe00000  rw
                    huge    2 MiB  0x0000000008000000 0x0000000008000000 0x0000000008000000 0x00007fedc7e00000  rw
                     odd    4 KiB  0x0000000010000000 0x0000000008002000 0x0000000008002000 0x00007fedbfe00000  rw
   0000:00:02.0/vga.vram    4 KiB  0x0000000020080000 0x0000000001000000 0x0000000001000000 0x00007fedcec00000  rw
    /rom@etc/acpi/tables    4 KiB  0x00000000210c0000 0x0000000000040000 0x0000000000200000 0x00007fee40a00000  ro
                 pc.bios    4 KiB  0x0000000020000000 0x0000000000040000 0x0000000000040000 0x00007fee42600000  ro
"""


def test_all_but_the_first_since_9_0() -> None:
    assert blocks_that_lose(BLOCKS, (10, 0, 0)) == ["huge", "0000:00:02.0/vga.vram"]
    assert blocks_that_lose(BLOCKS, (9, 0, 0)) == ["huge", "0000:00:02.0/vga.vram"]


def test_all_before_and_who_may_write_was_not_told_then() -> None:
    without = "".join(f"{line[: line.index(' 0x00007f')]}\n" for line in BLOCKS.splitlines()[1:])
    assert "rw" not in without and "0x0000000000200000\n" in without
    assert blocks_that_lose(without, (7, 2, 0)) == ["memfd", "huge", "0000:00:02.0/vga.vram"]
