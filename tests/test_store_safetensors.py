"""Safetensors directories: exact through one file and shards; every kind of damage is named, with file and tensor."""

import json
import os
import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jevons.store import safetensors_io as io
from jevons.store.files import CheckpointError, StoreError


def tensors(n=9):
    big = torch.randn(8, 16)
    made = {f"layer.{i}.weight": torch.randn(random.randrange(1, 20), 7) for i in range(n)}
    return made | {"view": big[2:5], "transposed": big.T, "half": torch.randn(3, dtype=torch.bfloat16), "n": torch.tensor(7)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("limit", [10**9, 700, 1])
def test_round_trip(tmp_path, limit):
    original = tensors()
    files = io.write_tensors(tmp_path, original, limit)
    assert sorted(files) == sorted(p.name for p in tmp_path.iterdir())
    assert (io.SINGLE in files) == (limit == 10**9) and len(files) >= {10**9: 1, 700: 4, 1: len(original)}[limit]
    assert same(io.read_tensors(tmp_path), original)
    headers = io.read_headers(tmp_path)
    assert all(headers[k].shape == tuple(original[k].shape) for k in original)


def test_the_library_reads_what_is_written_and_the_reverse(tmp_path):
    from safetensors.torch import load_file, save_file

    original = tensors()
    io.write_tensors(tmp_path, original)
    assert same(load_file(tmp_path / io.SINGLE), original)
    save_file({k: v.clone().contiguous() for k, v in original.items()}, tmp_path / io.SINGLE)
    assert same(io.read_tensors(tmp_path), original)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        io.read_tensors(tmp_path)


def file_of(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(start, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


A, B = entry(0, 8), entry(8, 16)
BAD = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "huge length": (file_of({}, length=2**63), str(2**63)),
    "length past the end": (file_of({}, length=3), "truncated"),
    "not JSON": (file_of(b"{nonsense}"), "not a safetensors header"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not a safetensors header"),
    "a list": (file_of([1]), "list"),
    "deep": (file_of(b"[" * 100_000), "not a safetensors header"),
    "name twice": (file_of(b'{"a": 1, "a": 2}'), "'a' appears twice"),
    "truncated data": (file_of({"a": A, "b": B}, b"\0" * 12), "truncated: tensor b"),
    "trailing data": (file_of({"a": A}, b"\0" * 12), "4 bytes follow"),
    "overlap": (file_of({"a": A, "b": entry(4, 12)}, b"\0" * 12), "tensor b at bytes 4..12 overlaps"),
    "same place": (file_of({"a": A, "b": A}, b"\0" * 8), "overlaps"),
    "hole": (file_of({"a": A, "b": entry(12, 16)}, b"\0" * 16), "tensor b .* leaves 4 bytes"),
    "wrong size": (file_of({"a": entry(0, 8, shape=[3])}, b"\0" * 8), "tensor a is described"),
    "negative": (file_of({"a": entry(-8, 0, shape=[2])}), "tensor a is described"),
    "negative shape": (file_of({"a": entry(0, 8, shape=[-1, -2])}, b"\0" * 8), "tensor a is described"),
    "float shape": (file_of({"a": entry(0, 8, shape=[2.0])}, b"\0" * 8), "tensor a is described"),
    "unknown dtype": (file_of({"a": entry(0, 8, dtype="F7")}, b"\0" * 8), "tensor a is described"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [2]}}), "tensor a is described"),
    "entry is text": (file_of({"a": "weights"}), "tensor a is described"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / io.SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        io.read_tensors(tmp_path)
    assert str(tmp_path / io.SINGLE) in str(error.value)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_cut_and_any_flipped_header_byte_is_an_error_or_harmless(tmp_path_factory, data):
    """Never a crash or another kind of exception."""
    tmp_path = tmp_path_factory.mktemp("cut")
    io.write_tensors(tmp_path, {"a": torch.ones(3, 4), "b": torch.zeros(5)})
    content = bytearray((tmp_path / io.SINGLE).read_bytes())
    length = int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        (tmp_path / io.SINGLE).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(CheckpointError):
            io.read_tensors(tmp_path)
    else:
        content[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
        (tmp_path / io.SINGLE).write_bytes(content)
        try:
            io.read_tensors(tmp_path)
        except CheckpointError as error:
            assert io.SINGLE in str(error)


@pytest.fixture
def sharded(tmp_path):
    io.write_tensors(tmp_path, {f"t{i}": torch.randn(10) for i in range(4)}, 80)
    index = json.loads((tmp_path / io.INDEX).read_text())
    assert index["weight_map"]["t0"] == "model-00001-of-00002.safetensors"
    return tmp_path, index


def reindex(directory, index):
    (directory / io.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors",
                                  "weights.bin", "..", ""])
def test_index_cannot_leave_the_directory(sharded, file):
    directory, index = sharded
    io.write_tensors(directory.parent, {"t2": torch.zeros(1)})
    os.rename(directory.parent / io.SINGLE, directory.parent / "secret.safetensors")
    index["weight_map"]["t2"] = file
    reindex(directory, index)
    with pytest.raises(CheckpointError, match="t2 in .*same directory"):
        io.read_tensors(directory)


def test_missing_shard_and_missing_tensor(sharded):
    directory, index = sharded
    index["weight_map"]["t9"] = "model-00001-of-00002.safetensors"
    reindex(directory, index)
    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors lacks tensor t9"):
        io.read_tensors(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors is missing; .* places t2"):
        io.read_tensors(directory)


def test_tensor_in_two_shards_or_unknown_or_elsewhere(sharded):
    directory, index = sharded
    weights = index["weight_map"]
    del weights["t0"]
    reindex(directory, index)
    with pytest.raises(CheckpointError, match="holds t0, which"):
        io.read_tensors(directory)
    weights["t0"] = "model-00002-of-00002.safetensors"
    reindex(directory, index)
    with pytest.raises(CheckpointError, match="00002.safetensors lacks tensor t0"):
        io.read_tensors(directory)
    weights["t0"] = "model-00003.safetensors"
    reindex(directory, index)
    io.write_tensors(directory, {"t0": torch.zeros(1)})
    os.rename(directory / io.SINGLE, directory / "model-00003.safetensors")
    with pytest.raises(CheckpointError, match="t0 is in two files"):
        io.read_tensors(directory)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}',
                                  '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'])
def test_bad_index(tmp_path, text):
    (tmp_path / io.INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        io.read_tensors(tmp_path)


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    old = tensors()
    io.write_tensors(tmp_path, old)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "fsync", full)
    with pytest.raises(StoreError, match="model.safetensors could not be written.*No space left"):
        io.write_tensors(tmp_path, tensors())
    assert [p.name for p in tmp_path.iterdir()] == [io.SINGLE] and same(io.read_tensors(tmp_path), old)
