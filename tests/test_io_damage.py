"""Damaged files end in one clear error, or load as they were."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch_files import archive, assert_refused, assert_same, members, saved, small

from convmerge.errors import LoadError
from convmerge.io import load


def boundaries(path: Path) -> list[int]:
    """Where the parts of a zip archive begin and end."""
    with zipfile.ZipFile(path) as file:
        ends = [info.header_offset for info in file.infolist()]
        ends += [info.header_offset + 30 + len(info.filename) for info in file.infolist()]
        directory = file.start_dir
    size = path.stat().st_size
    return sorted({*ends, directory, directory + 46, size - 22, size - 1})


def test_cut_short_anywhere_is_one_clear_error(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pt", small()).read_bytes()
    path = tmp_path / "m.pt"
    cuts = {cut + shift for cut in boundaries(tmp_path / "whole.pt") for shift in (-1, 0, 1)}
    for cut in sorted(cuts - {-1, len(whole)}):
        path.write_bytes(whole[:cut])
        for trust in (False, True):
            assert_refused(path, "m.pt", trust=trust)
    assert len(cuts) > 40


def test_legacy_cut_short(tmp_path: Path) -> None:
    whole = saved(tmp_path / "w.pt", small().state_dict(), _use_new_zipfile_serialization=False).read_bytes()
    path = tmp_path / "m.pt"
    for cut in {*range(0, len(whole), 97), 1, 13, 14, 15, 16, 30, len(whole) - 1}:
        path.write_bytes(whole[:cut])
        assert_refused(path, "m.pt|pickle", factory=f"{__name__}:small")


def test_a_flipped_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pt", small()).read_bytes()
    path, refused = tmp_path / "m.pt", 0
    positions = range(0, len(whole), 41)
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            model = load(path)
        except LoadError:
            refused += 1
        else:
            assert_same(model, small())
    assert refused > len(positions) / 4, f"{refused} of {len(positions)}"


def test_a_flipped_weight_byte_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", small())
    whole = path.read_bytes()
    start = whole.index(small()[0].weight.detach().numpy().tobytes())
    for position in range(start, start + 3 * 5 * 3 * 4, 17):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert_refused(path, "is damaged: m/data/0 does not match its checksum")


def test_member_that_claims_to_be_a_directory(tmp_path: Path) -> None:
    """torch.load gives uninitialised memory for it."""
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members(small()).items():
            info = zipfile.ZipInfo(f"m/{name}")
            info.external_attr = 0x10 if name == "data/0" else 0
            file.writestr(info, data)
    assert_refused(path, "claims to be a directory")


def test_files_without_checksums_load(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "m.pt", small())
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(load(path), small())


def test_archives_that_are_not_as_torch_writes_them(tmp_path: Path) -> None:
    parts = members(small())
    path = tmp_path / "m.pt"
    storages = {key.removeprefix("data/"): value for key, value in parts.items() if key.startswith("data/")}

    archive(path, parts["data.pkl"], storages)
    assert_same(load(path), small())
    archive(path, parts["data.pkl"], storages, byteorder=b"big")
    assert_refused(path, "another byte order")
    archive(path, parts["data.pkl"], storages, byteorder=b"\xff")
    assert_refused(path, "another byte order")
    archive(path, parts["data.pkl"], {key: value for key, value in storages.items() if key != "2"})
    assert_refused(path, "lacks the numbers of storage 2")
    archive(path, parts["data.pkl"], {**storages, "0": storages["0"][:-4]})
    assert_refused(path, "lacks the numbers of storage 0")
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning):
        file.writestr("archive/data.pkl", parts["data.pkl"])
    assert_refused(path, "doubled")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in parts.items():
            file.writestr(f"archive/{name}", data)
    assert_refused(path, "packed again")
