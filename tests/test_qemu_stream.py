"""The reader and the writer of QEMU's migration stream, against a plain writer and a plain model of their own."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmsnap.errors import HypervisorError
from vmsnap_drivers.qemu import ram_image
from vmsnap_drivers.qemu.ram_image import image_path
from vmsnap_drivers.qemu.stream import SMALLEST_BUFFER_BYTES, MigrationStreamReader
from vmsnap_drivers.qemu.stream_format import CapturedMemory, StreamError
from vmsnap_drivers.qemu.synthesis import write_stream

PREAMBLE = b"QEVM\0\0\0\3" + b"\7\0\0\0\x0epc-i440fx-10.0"
SMALL_PAGES = b"\5\x1econfiguration/target-page-bits\0\0\0\1\0\0\0\x0a"
RAM_ID = b"\0\0\0\2"
START = b"\1" + RAM_ID + b"\3ram" + b"\0\0\0\0" + b"\0\0\0\4"
FOOTER = b"\x7e" + RAM_ID
EOS = (0x10).to_bytes(8, "big")
SWITCHOVER_START = b"\x08\0\x0b\0\0"
DESCRIPTION = b'{"configuration": {}, "page_size": %d, "devices": []}'
MEMORY_FOLDER = "/dev/shm"


def device_state(page_bytes: int = 4096) -> bytes:
    description = DESCRIPTION % page_bytes
    device = b"\4\0\0\0\3\5timer\0\0\0\0\0\0\0\2" + bytes(range(256)) + b"\0\6\x7e\0\0\0\3"
    return device + b"\0\6" + len(description).to_bytes(4, "big") + description


@dataclass
class PlainStream:
    """Writes a stream record by record, as QEMU does, and keeps what RAM must be afterwards."""

    blocks: dict[str, int]
    page_bytes: int = 4096
    preamble: bytes = PREAMBLE
    content: bytearray = field(init=False)
    ram: dict[str, bytearray] = field(init=False)
    named: str = ""

    def __post_init__(self) -> None:
        sizes = {name: pages * self.page_bytes for name, pages in self.blocks.items()}
        self.ram = {name: bytearray(size) for name, size in sizes.items()}
        self.content = bytearray(self.preamble + START + (sum(sizes.values()) | 4).to_bytes(8, "big"))
        for name, size in sizes.items():
            self.content += self._name(name) + size.to_bytes(8, "big")
        self.content += EOS + FOOTER + b"\2" + RAM_ID

    @staticmethod
    def _name(name: str) -> bytes:
        return bytes((len(name.encode()),)) + name.encode()

    def record(self, name: str, number: int, page: bytes, *, flags: int = 0, anew: bool = False) -> None:
        """One page record; ``page`` is empty for a page of zeros; ``anew`` names the block without need."""
        again = self.named == name and not anew
        word = number * self.page_bytes | (8 if page else 2) | (0x20 if again else 0) | flags
        self.content += word.to_bytes(8, "big") + (b"" if again else self._name(name)) + (page or b"\0")
        self.named = name
        if number < self.blocks.get(name, 0):
            begin = number * self.page_bytes
            self.ram[name][begin : begin + self.page_bytes] = page or bytes(self.page_bytes)

    def page(self, seed: int) -> bytes:
        """A page full of bytes, or for every third seed with only one that is not zero."""
        rng = random.Random(seed)
        if seed % 3:
            return rng.randbytes(self.page_bytes - 1) + b"\1"
        page = bytearray(self.page_bytes)
        page[rng.randrange(self.page_bytes)] = 0x80
        return bytes(page)

    def next_section(self, kind: int = 2) -> None:
        self.content += EOS + FOOTER + bytes((kind,)) + RAM_ID

    def finish(self) -> bytes:
        return bytes(self.content + EOS + FOOTER + device_state(self.page_bytes))


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as name:
        yield Path(name)


def parse(stream: bytes, into: Path, **options: Any) -> CapturedMemory:
    fd = os.memfd_create("stream")
    try:
        os.write(fd, stream)
        os.lseek(fd, 0, os.SEEK_SET)
        return MigrationStreamReader(fd, into, **options).run()
    finally:
        os.close(fd)


def images(captured: CapturedMemory, where: Path) -> dict[str, bytes]:
    return {b.name: image_path(where, i, b.name).read_bytes() for i, b in enumerate(captured.blocks)}


def assert_refused(stream: bytes, **options: int) -> StreamError:
    """The stream is refused, in one line, and nothing of it is left."""
    with folder() as into:
        with pytest.raises(StreamError) as refused:
            parse(stream, into, **options)
        assert list(into.iterdir()) == []
    assert "\n" not in str(refused.value)
    return refused.value


BLOCKS = {"pc.ram": 200, "0000:00:02.0/vga.vram": 16, "pc.bios": 3, "/rom@etc/acpi/tables": 1}
RUN = st.tuples(
    st.sampled_from(sorted(BLOCKS)),
    st.integers(0, 199),
    st.one_of(st.integers(1, 4), st.integers(1, 200)),
    st.sampled_from(["pages", "zeros", "backwards", "alternating"]),
    st.sampled_from(["", "", "section", "anew", "command"]),
    st.integers(0, 7),
)


def stream_of(runs: list[tuple[str, int, int, str, str, int]]) -> PlainStream:
    plain = PlainStream(BLOCKS)
    for name, first, count, kind, before, seed in runs:
        if before == "section":
            plain.next_section()
        elif before == "command":
            plain.content += EOS + FOOTER + SWITCHOVER_START + b"\2" + RAM_ID
        numbers = range(first % BLOCKS[name], min(BLOCKS[name], first % BLOCKS[name] + count))
        for k, number in enumerate(reversed(numbers) if kind == "backwards" else numbers):
            zero = kind == "zeros" or (kind == "alternating" and (k + seed) % 3 == 0)
            plain.record(name, number, b"" if zero else plain.page(seed + number), anew=before == "anew" and k == 0)
    plain.next_section(3)
    return plain


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(runs=st.lists(RUN, max_size=12))
def test_a_stream_becomes_the_ram_that_its_records_describe(runs: list[tuple[str, int, int, str, str, int]]) -> None:
    plain = stream_of(runs)
    with folder() as into:
        captured = parse(plain.finish(), into, buffer_bytes=SMALLEST_BUFFER_BYTES)
        assert images(captured, into) == plain.ram
        assert {b.name: b.length_bytes // 4096 for b in captured.blocks} == BLOCKS
        assert captured.preamble == PREAMBLE
        assert captured.device_state.read_bytes() == device_state()
        assert {path.stat().st_mode & 0o777 for path in into.iterdir()} == {0o600}
        assert CapturedMemory.from_json(captured.to_json(), device_state=captured.device_state) == captured


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    runs=st.lists(RUN, max_size=8),
    pieces=st.lists(st.one_of(st.integers(1, 20), st.integers(1, 200_000)), min_size=1, max_size=20),
    block=st.booleans(),
)
def test_the_stream_may_arrive_in_any_pieces(
    runs: list[tuple[str, int, int, str, str, int]], pieces: list[int], block: bool
) -> None:
    plain = stream_of(runs)
    stream = plain.finish()
    reading, writing = os.pipe()
    os.set_blocking(reading, block)

    def send() -> None:
        position = turn = 0
        while position < len(stream):
            position += os.write(writing, stream[position : position + pieces[turn % len(pieces)]])
            turn += 1
        os.close(writing)

    sender = threading.Thread(target=send)
    sender.start()
    with folder() as into:
        progress: list[int] = []
        reader = MigrationStreamReader(
            reading, into, buffer_bytes=SMALLEST_BUFFER_BYTES, stall_timeout_seconds=60, on_progress=progress.append
        )
        assert images(reader.run(), into) == plain.ram
        sender.join()
        os.close(reading)
        assert progress == sorted(progress)
        assert progress[-1] == reader.read_bytes == len(stream)


def test_pages_of_zeros_stay_holes_and_pages_that_became_zero_are_holes_again() -> None:
    plain = PlainStream({"pc.ram": 2000})
    for number in range(1000):
        plain.record("pc.ram", number, b"")
    for number in range(1000, 2000):
        plain.record("pc.ram", number, plain.page(number))
    plain.next_section()
    for number in range(1000, 1990):
        plain.record("pc.ram", number, b"")
    with folder() as into:
        captured = parse(plain.finish(), into)
        assert images(captured, into) == plain.ram
        assert image_path(into, 0, "pc.ram").stat().st_blocks * 512 <= 64 * 1024


def test_long_streams_in_a_random_mix_go_round() -> None:
    """More than a buffer and more than a chunk of the writer, so that both are used again."""
    rng = random.Random(1)
    plain = PlainStream({"pc.ram": 3000})
    for number in rng.sample(range(3000), 1000) + list(range(3000)):
        plain.record("pc.ram", number, b"" if rng.random() < 0.4 else plain.page(rng.randrange(1000)))
    with folder() as first, folder() as second:
        captured = parse(plain.finish(), first)
        assert images(captured, first) == plain.ram
        assert images(parse(synthesise(captured, first), second), second) == plain.ram


def test_pages_that_were_never_sent_are_counted() -> None:
    plain = PlainStream({"pc.ram": 10})
    plain.record("pc.ram", 3, b"")
    plain.record("pc.ram", 4, plain.page(1))
    with folder() as into, tempfile.TemporaryFile() as file:
        file.write(plain.finish())
        file.seek(0)
        reader = MigrationStreamReader(file.fileno(), into)
        reader.run()
        assert reader.absent_pages == 8


def test_a_stream_without_end_section_is_taken() -> None:
    """A background snapshot goes from its last part to the device state directly."""
    plain = PlainStream({"pc.ram": 1})
    plain.record("pc.ram", 0, plain.page(0))
    with folder() as into:
        assert images(parse(plain.finish(), into), into) == plain.ram


def test_block_names_cannot_leave_the_folder() -> None:
    names = {"../../etc/passwd": 1, "..": 1, "a/../../b": 1, "x" * 255: 1, "ü": 1}
    plain = PlainStream(names)
    for name in names:
        plain.record(name, 0, plain.page(1))
    with folder() as into:
        inner = into / "inner"
        inner.mkdir()
        captured = parse(plain.finish(), inner)
        assert images(captured, inner) == plain.ram
        assert list(into.iterdir()) == [inner]
        assert len(list(inner.iterdir())) == len(names) + 1


def small_stream() -> bytes:
    """All kinds of records and sections in about 4 KiB, in pages of 1 KiB."""
    plain = PlainStream({"pc.ram": 6, "pc.bios": 1}, 1024, PREAMBLE + SMALL_PAGES)
    plain.record("pc.ram", 0, plain.page(0))
    plain.record("pc.ram", 1, b"")
    plain.record("pc.bios", 0, b"")
    plain.next_section()
    plain.record("pc.ram", 1, plain.page(2))
    plain.record("pc.ram", 2, b"")
    plain.record("pc.ram", 0, b"")
    plain.content += EOS + FOOTER + SWITCHOVER_START + b"\3" + RAM_ID
    plain.record("pc.ram", 4, plain.page(3), anew=True)
    return plain.finish()


def test_a_stream_cut_off_anywhere_is_refused() -> None:
    stream = small_stream()
    with folder() as into:
        assert parse(stream, into).page_bytes == 1024
    for length in range(len(stream)):
        assert_refused(stream[:length], buffer_bytes=SMALLEST_BUFFER_BYTES)


def test_trailing_garbage_is_refused() -> None:
    assert_refused(small_stream() + b"x")


@settings(deadline=None, max_examples=600)
@given(data=st.data())
def test_damage_gives_a_stream_error_or_other_pages_and_takes_no_memory(data: st.DataObject) -> None:
    stream = bytearray(small_stream())
    # Most of the stream is page content, where a flip cannot be seen: aim at the rest.
    headers = [i for i in range(len(stream)) if i < 220 or stream[i] < 0x80]
    for position in data.draw(st.lists(st.sampled_from(headers), min_size=1, max_size=4)):
        stream[position] ^= 1 << data.draw(st.integers(0, 7))
    with folder() as into:
        tracemalloc.start()
        try:
            parse(bytes(stream), into, buffer_bytes=SMALLEST_BUFFER_BYTES, max_ram_bytes=1 << 32)
        except StreamError:
            assert list(into.iterdir()) == []
        finally:
            peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak_bytes < 16 << 20


@given(garbage=st.binary(max_size=300))
def test_garbage_is_refused(garbage: bytes) -> None:
    assert_refused(garbage)
    assert_refused(PREAMBLE + garbage)
    assert_refused(PREAMBLE + START + garbage)


def refused_streams() -> Iterator[tuple[str, bytes, str]]:
    def with_record(name: str, number: int, page: bytes, flags: int = 0) -> bytes:
        plain = PlainStream({"pc.ram": 4})
        plain.record("pc.ram", 0, b"")
        plain.record(name, number, page, flags=flags)
        return plain.finish()

    def with_blocks(*blocks: tuple[bytes, int], total: int) -> bytes:
        listed = b"".join(bytes((len(n),)) + n + size.to_bytes(8, "big") for n, size in blocks)
        return PREAMBLE + START + (total | 4).to_bytes(8, "big") + listed + EOS + FOOTER

    def within_many(number: int, flags: int = 0, fill: bytes = b"\0") -> bytes:
        plain = PlainStream({"pc.ram": 400})
        for good in range(200):
            plain.record("pc.ram", good, b"" if good % 5 else b"x" * 4096)
        plain.content += (number * 4096 | 0x22 | flags).to_bytes(8, "big") + fill
        for good in range(200, 400):
            plain.record("pc.ram", good, b"")
        return plain.finish()

    page = b"x" * 4096
    begun = bytes(PlainStream({"pc.ram": 4}).content)
    other = b"\0\0\0\7\x0cdirty-bitmap\0\0\0\0\0\0\0\1"
    capabilities = b"\5\x1aconfiguration/capabilities\0\0\0\1\0\0\0\1\x0amapped-ram"
    yield "magic", b"QEVN" + PREAMBLE[4:], "QEVM"
    yield "version", b"QEVM\0\0\0\2", "version 2"
    yield "mapped-ram", PREAMBLE + capabilities, "mapped-ram"
    yield "unknown subsection", PREAMBLE + b"\5\5hello\0\0\0\1", "'hello'"
    yield "bitmap before ram", PREAMBLE + b"\1" + other, "dirty-bitmap"
    yield "device state before ram", PREAMBLE + b"\4" + other, "dirty-bitmap"
    yield "bitmap after ram", begun + EOS + FOOTER + b"\1" + other, "dirty-bitmap"
    yield "other section's part", begun + EOS + FOOTER + b"\2\0\0\0\7", "section 7"
    yield "ram version", PREAMBLE + START[:-1] + b"\5", "version 5"
    yield "return path", PREAMBLE + b"\x08\0\1\0\0", "return-path"
    yield "xbzrle", with_record("pc.ram", 1, page, 0x40), "xbzrle"
    yield "compression", with_record("pc.ram", 1, page, 0x100), "compressed"
    yield "hook", with_record("pc.ram", 1, page, 0x80), "RDMA"
    yield "multifd", begun + (0x200).to_bytes(8, "big"), "multifd"
    yield "no block yet", begun + (0x22).to_bytes(8, "big") + b"\0", "names no RAM block"
    yield "beyond the block", with_record("pc.ram", 4, page), "beyond"
    yield "far beyond the block", with_record("pc.ram", (1 << 52) - 1, b""), "beyond"
    yield "unknown block", with_record("pc.rom", 0, page), "pc.rom"
    yield "filled with ones", begun + b"\0\0\0\0\0\0\0\2\6pc.ram\1", "non-zeros"
    yield "filled with ones again", begun + b"\0\0\0\0\0\0\0\2\6pc.ram\0" + b"\0\0\0\0\0\0\0\x22\1", "non-zeros"
    yield "beyond the block, by name", begun + (0x4000 | 2).to_bytes(8, "big") + b"\6pc.ram\0", "beyond"
    yield "beyond the block, among many", within_many(400), "beyond"
    yield "compression, among many", within_many(3, 0x100), "compressed"
    yield "unknown flag, among many", within_many(3, 0x800), "0x822"
    yield "filled with ones, among many", within_many(3, fill=b"\1"), "non-zeros"
    yield "part after the end", begun + EOS + FOOTER + (b"\3" + RAM_ID + EOS + FOOTER) * 2, "section 2"
    yield "block listed twice", with_blocks((b"a", 4096), (b"a", 4096), total=8192), "twice"
    yield "no name", with_blocks((b"", 4096), total=4096), "name"
    yield "no text", with_blocks((b"\xff", 4096), total=4096), "not a text"
    yield "half a page", with_blocks((b"a", 2048), (b"b", 2048), total=4096), "length"
    yield "empty block", with_blocks((b"a", 0), total=4096), "length"
    yield "more than the total", with_blocks((b"a", 8192), total=4096), "together"
    yield "absurd size", with_blocks((b"a", 1 << 62), total=1 << 62), "allowed"
    yield "wrong footer", begun + EOS + b"\x7e\0\0\0\3", "end properly"
    yield "unknown section", begun + EOS + FOOTER + b"\x55", "0x55"
    yield "other page size", begun + EOS + FOOTER + device_state(8192), "8192"


@pytest.mark.parametrize(("stream", "said"), [pytest.param(s, t, id=name) for name, s, t in refused_streams()])
def test_what_is_not_taken_is_refused_by_name(stream: bytes, said: str) -> None:
    error = assert_refused(stream)
    assert said in str(error)
    assert isinstance(error, HypervisorError)


def test_a_device_state_without_end_is_refused() -> None:
    plain = PlainStream({"pc.ram": 1})
    plain.content += EOS + FOOTER + b"\4" + bytes(300_000)
    assert "longer than 200000" in str(assert_refused(bytes(plain.content), max_device_state_bytes=200_000))


def test_a_writer_that_stalls_is_given_up() -> None:
    reading, writing = os.pipe()
    with folder() as into:
        os.write(writing, PREAMBLE)
        with pytest.raises(StreamError, match="stands still"):
            MigrationStreamReader(reading, into, stall_timeout_seconds=0.05).run()
    os.close(reading)
    os.close(writing)


def test_a_full_file_system_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(fd: int, content: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plain = PlainStream({"pc.ram": 100})
    for number in range(100):
        plain.record("pc.ram", number, plain.page(number))
    monkeypatch.setattr(os, "pwrite", no_room)
    assert "No space left" in str(assert_refused(plain.finish()))


def test_a_file_system_without_holes_gets_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoHoles:
        def fallocate(self, fd: int, mode: int, offset: int, length: int) -> int:
            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    plain = PlainStream({"pc.ram": 100})
    for number in range(100):
        plain.record("pc.ram", number, plain.page(number))
    for number in range(20, 80):
        plain.record("pc.ram", number, b"")
    monkeypatch.setattr(ram_image, "_libc", NoHoles())
    with folder() as into:
        assert images(parse(plain.finish(), into), into) == plain.ram


def test_memory_taken_does_not_grow_with_ram() -> None:
    plain = PlainStream({"pc.ram": 16384})
    page = plain.page(0)
    for number in range(16384):
        plain.record("pc.ram", number, page if number % 3 else b"")
    stream = plain.finish()
    with folder() as into:
        tracemalloc.start()
        parse(stream, into, buffer_bytes=1 << 20)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 4 << 20


def test_files_that_are_there_already_are_not_touched() -> None:
    with folder() as into:
        taken = image_path(into, 0, "pc.ram")
        taken.write_bytes(b"precious")
        with pytest.raises(StreamError, match="File exists"):
            parse(PlainStream({"pc.ram": 1}).finish(), into)
        assert taken.read_bytes() == b"precious"


def synthesise(captured: CapturedMemory, where: Path, mapped: frozenset[str] = frozenset()) -> bytes:
    with tempfile.TemporaryFile() as file:
        written_bytes = write_stream(file.fileno(), captured, where, mapped)
        file.seek(0)
        content = file.read()
    assert len(content) == written_bytes
    return content


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(runs=st.lists(RUN, max_size=12), mapped=st.frozensets(st.sampled_from(sorted(BLOCKS))))
def test_a_synthesised_stream_gives_the_same_memory(
    runs: list[tuple[str, int, int, str, str, int]], mapped: frozenset[str]
) -> None:
    plain = stream_of(runs)
    with folder() as first, folder() as second:
        captured = parse(plain.finish(), first)
        again = synthesise(captured, first, mapped)
        with tempfile.TemporaryFile() as file:
            file.write(again)
            file.seek(0)
            reader = MigrationStreamReader(file.fileno(), second)
            copy = reader.run()
        expected = {name: bytes(len(ram)) if name in mapped else bytes(ram) for name, ram in plain.ram.items()}
        assert images(copy, second) == expected
        assert reader.absent_pages == sum(BLOCKS[name] for name in mapped)
        assert copy.to_json() == captured.to_json()
        assert copy.device_state.read_bytes() == captured.device_state.read_bytes()


def test_a_synthesised_stream_needs_whole_images_and_known_blocks() -> None:
    plain = PlainStream({"pc.ram": 4})
    with folder() as into:
        captured = parse(plain.finish(), into)
        with pytest.raises(StreamError, match=r"no RAM block 'pc\.rom'"):
            synthesise(captured, into, frozenset({"pc.rom"}))
        os.truncate(image_path(into, 0, "pc.ram"), 4096)
        with pytest.raises(StreamError, match="4096 bytes instead of 16384"):
            synthesise(captured, into)
        image_path(into, 0, "pc.ram").unlink()
        assert len(synthesise(captured, into, frozenset({"pc.ram"}))) < 1000


def test_a_reader_that_goes_away_ends_the_writing() -> None:
    plain = PlainStream({"pc.ram": 300})
    for number in range(300):
        plain.record("pc.ram", number, plain.page(number))
    reading, writing = os.pipe()
    os.close(reading)
    with folder() as into:
        captured = parse(plain.finish(), into)
        with pytest.raises(StreamError, match="broke off"):
            write_stream(writing, captured, into)
    os.close(writing)


@pytest.mark.parametrize(
    "damage", [{"page_bytes": 5}, {"preamble": "%"}, {"blocks": [{"name": "a"}]}, {"ram_section": 3}]
)
def test_a_damaged_description_is_refused(damage: dict[str, object]) -> None:
    with folder() as into:
        content = parse(PlainStream({"pc.ram": 1}).finish(), into).to_json()
    with pytest.raises(StreamError):
        CapturedMemory.from_json({**content, **damage}, device_state=Path("/nowhere"))
