"""Whatever lies in the storage: errors, never tracebacks, hangs or wild allocations."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable

import pytest
from backports.zstd import ZstdCompressor
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.damage import manifest_with, seal_plain
from tests.test_storage_contract import Memory
from vmsnap.errors import DamageFound, RepositoryError
from vmsnap.repository import ImageRecord
from vmsnap.repository.blobs import decompressed
from vmsnap.repository.config import decode_config, decode_text, encode_text
from vmsnap.repository.format import BlobKind, Codec, chunk_count, tree_depth
from vmsnap.repository.garbage import open_garbage
from vmsnap.repository.index import IndexedPack, open_index, seal_index
from vmsnap.repository.keys import PassphraseKey, decode_key
from vmsnap.repository.manifest import open_manifest
from vmsnap.repository.nodes import encode_list, load_node
from vmsnap.repository.packs import ENTRY, PackBuilder, check_blobs, open_pack
from vmsnap.repository.seal import Vault
from vmsnap.repository.sessions import Session, list_sessions
from vmsnap.repository.tree import root_node

VAULT = Vault(bytes(32), bytes(16), encrypted=False)
GOOD_KEY = encode_text(PassphraseKey(1, "ab", "", "00" * 16, "00" * 48))


def mutations(data: bytes) -> st.SearchStrategy[bytes]:
    cut = st.integers(0, len(data)).map(lambda at: data[:at])
    flip = st.tuples(st.integers(0, max(0, len(data) - 1)), st.binary(min_size=1, max_size=8)).map(
        lambda change: data[: change[0]] + change[1] + data[change[0] + len(change[1]) :]
    )
    return st.one_of(st.binary(max_size=300), cut, flip)


def rehash(line: bytes) -> bytes:
    line = line.split(b"\n")[0]
    return line + b"\n" + blake3(line).hexdigest().encode() + b"\n"


def survives(parse: Callable[[], object]) -> None:
    with contextlib.suppress(DamageFound, RepositoryError):
        parse()


@settings(max_examples=300, deadline=None)
@given(data=mutations(GOOD_KEY), honest=st.booleans())
@example(data=b"[" * 100_000, honest=True)
@example(data=b'{"version":' + b"9" * 5000 + b"}", honest=True)
def test_no_config_or_key_is_a_traceback(data: bytes, honest: bool) -> None:
    data = rehash(data) if honest else data
    survives(lambda: decode_config(data))
    survives(lambda: decode_key("keys/ab", data))
    survives(lambda: decode_text(data, ImageRecord, "x"))


@pytest.mark.parametrize("cost", [{"memory_kib": 1 << 40}, {"time_cost": 10**9}, {"lanes": 0}, {"memory_kib": 1}])
def test_a_key_cannot_ask_for_all_memory_or_time(cost: dict[str, int]) -> None:
    key = json.loads(GOOD_KEY.split(b"\n")[0])
    key["cost"] |= cost
    with pytest.raises(DamageFound, match="impossible"):
        decode_key("keys/ab", encode_text(key))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_index_manifest_or_pack_is_a_traceback(data: st.DataObject) -> None:
    _, index = seal_index(VAULT, [IndexedPack(b"p" * 32, 100, ENTRY.pack(b"c" * 32, 8, 40, 24, 1))])
    content = data.draw(mutations(index[40:-16]))
    survives(lambda: open_index(VAULT, "index/x", VAULT.seal_object("index/x", content)))
    survives(lambda: open_index(VAULT, "index/x", content))
    content = data.draw(mutations(seal_plain(manifest_with())))
    survives(lambda: open_manifest(VAULT, "manifests/x", VAULT.seal_object("manifests/x", content)))
    content = data.draw(mutations(b'{"awaits":null,"leftovers":[],"packs":["' + b"ab" * 32 + b'"]}'))
    survives(lambda: open_garbage(VAULT, "garbage/x", VAULT.seal_object("garbage/x", content)))
    builder = PackBuilder(VAULT, bytearray(1000))
    builder.append(b"c" * 32, BlobKind.DATA, Codec.RAW, 24, b"x" * 24)
    pack = data.draw(mutations(bytes(builder.finish()[0])))
    survives(lambda: list(check_blobs(VAULT, builder.id, pack, open_pack(VAULT, builder.id, pack))))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_tree_node_is_a_traceback(data: st.DataObject) -> None:
    ids = bytes(range(128))
    image = ImageRecord(4 * 4096, 4096, 4, 1, "11" * 32)
    listed = encode_list(1, ids)
    differs = struct.pack("<BBI", 2, 1, 4) + b"b" * 32 + struct.pack("<I", 1) + struct.pack("<H", 2) + b"n" * 32
    assert load_node(image, root_node(image), lambda node, _: listed if node[:1] == b"b" else differs).ids == (
        ids[:64] + b"n" * 32 + ids[96:]
    )
    top, base = data.draw(mutations(differs)), data.draw(st.one_of(st.just(listed), mutations(listed)))
    found: list[bytes] = []
    survives(
        lambda: found.append(
            load_node(image, root_node(image), lambda node, _: top if node == root_node(image).id else base).ids
        )
    )
    assert all(len(each) == len(ids) for each in found)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_session_is_a_traceback(data: st.DataObject) -> None:
    storage = Memory()
    with Session(storage, VAULT, "write", "a backup") as session:
        content = VAULT.open_object(session.key, storage.raw[session.key])
        storage.raw[session.key] = VAULT.seal_object(session.key, data.draw(mutations(content)))
        storage.raw[session.key + ".heartbeat"] = data.draw(mutations(storage.raw[session.key]))
        (found,) = list_sessions(storage, VAULT)
        assert found.key in found.description


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_compressed_chunk_is_a_traceback_or_longer_than_it_should_be(data: st.DataObject) -> None:
    content = b"text" * 1000
    packed = data.draw(mutations(ZstdCompressor(level=1).compress(content, ZstdCompressor.FLUSH_FRAME)))
    with contextlib.suppress(ValueError):
        assert len(decompressed(packed, Codec.ZSTD, len(content))) == len(content)


def test_geometry() -> None:
    assert [chunk_count(size, 4096) for size in (0, 1, 4096, 4097)] == [0, 1, 1, 2]
    assert [tree_depth(chunks, 4) for chunks in (0, 1, 4, 5, 16, 17, 64, 65)] == [1, 1, 1, 2, 2, 3, 3, 4]
