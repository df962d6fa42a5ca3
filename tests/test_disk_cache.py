"""Cached pages on disk: there after a restart, bounded, and a damaged one is a miss."""

import os
import random
import shutil

import pytest

from jevons.engine.disk import DiskTier


def filled(path, pages, size=200, limit=10**6):
    tier = DiskTier(path, limit)
    data = {os.urandom(16): os.urandom(size) for _ in range(pages)}
    for key, payload in data.items():
        tier.put(key, payload)
    tier.close()
    return data


def test_pages_survive_a_restart(tmp_path):
    data = filled(tmp_path / "cache", 20)
    tier = DiskTier(tmp_path / "cache", 10**6)
    assert all(tier.get(key) == payload for key, payload in data.items())
    assert tier.get(os.urandom(16)) is None and all(key in tier for key in data)
    tier.close()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap", "gone", "longer"])
def test_a_damaged_page_is_a_miss(tmp_path, damage):
    data = filled(tmp_path, 6)
    key, other, *rest = data
    path = tmp_path / f"{key.hex()}.page"
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    elif damage == "cut":
        del raw[random.randrange(1, len(raw)) :]
    elif damage == "longer":
        raw += b"x"
    elif damage == "swap":  # the page of another prefix, or of other weights, under this one's name
        raw = (tmp_path / f"{other.hex()}.page").read_bytes()
    tier = DiskTier(tmp_path, 10**6)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else raw)
    assert tier.get(key) is None and key not in tier and not path.exists()
    assert all(tier.get(k) == data[k] for k in rest)
    tier.put(key, data[key])  # computed again, it is kept again
    tier.close()
    assert DiskTier(tmp_path, 10**6).get(key) == data[key]


def test_it_is_bounded_and_keeps_what_was_used_last(tmp_path):
    room = 10 * (200 + 46)
    first = filled(tmp_path, 10, limit=room)
    tier = DiskTier(tmp_path, room)
    kept = random.sample(list(first), 4)
    for key in kept:
        assert tier.get(key) is not None
    new = {os.urandom(16): os.urandom(200) for _ in range(6)}
    for key, payload in new.items():
        tier.put(key, payload)
    tier.put(os.urandom(16), os.urandom(room))  # larger than all there may be
    tier.close()
    assert tier.nbytes <= room and sum(p.stat().st_size for p in tmp_path.iterdir()) == tier.nbytes
    assert all(key in tier for key in [*kept, *new]) and sum(key in tier for key in first) == 4


def test_a_directory_that_goes_away_costs_nothing_but_its_pages(tmp_path):
    folder = tmp_path / "cache"
    data = filled(folder, 3)
    tier = DiskTier(folder, 10**6)
    shutil.rmtree(folder)
    assert all(tier.get(key) is None for key in data)
    for key, payload in data.items():
        tier.put(key, payload)
    tier.close()
    assert all(DiskTier(folder, 10**6).get(key) == payload for key, payload in data.items())


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "notes.page").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    filled(tmp_path, 3, limit=300)
    assert (tmp_path / "notes.page").read_text() == (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="x is a file; a directory would be right"):
        DiskTier(tmp_path / "x", 10**6)
