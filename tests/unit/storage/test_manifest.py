"""A checkpoint is what its manifest says, or it is refused."""

import dataclasses
import hashlib
import json

import pytest

from ds_dpo.errors import CheckpointError
from ds_dpo.storage.manifest import (
    FileEntry,
    Manifest,
    hash_file,
    newest_valid_checkpoint,
    read_manifest,
    step_folder_name,
    verify_manifest,
    write_manifest,
)


def make_checkpoint(checkpoints, step, content=b"weights"):
    folder = checkpoints / step_folder_name(step)
    folder.mkdir(parents=True)
    (folder / "a.pt").write_bytes(content)
    manifest = Manifest(
        step=step,
        world_size=2,
        stage=3,
        precision="bf16",
        fingerprint="f",
        layout="l",
        files={"a.pt": hash_file(folder / "a.pt")},
    )
    write_manifest(folder, manifest)
    return folder, manifest


def test_manifest_round_trip_and_documented_form(tmp_path):
    folder, manifest = make_checkpoint(tmp_path, 200)
    assert folder.name == "step_00000200"
    assert verify_manifest(folder) == manifest
    assert json.loads((folder / "manifest.json").read_text()) == {
        "format": 1,
        "step": 200,
        "world_size": 2,
        "stage": 3,
        "precision": "bf16",
        "fingerprint": "f",
        "layout": "l",
        "files": {"a.pt": {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}},
    }
    assert sorted(path.name for path in folder.iterdir()) == ["a.pt", "manifest.json"]


def flip_a_byte(folder):
    (folder / "a.pt").write_bytes(b"weightt")


def truncate(folder):
    (folder / "a.pt").write_bytes(b"weigh")


def remove(folder):
    (folder / "a.pt").unlink()


def add_a_shard(folder):
    (folder / "b.pt").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "named"),
    [(flip_a_byte, "a.pt.*SHA-256"), (truncate, "a.pt: 5 bytes.* 7"), (remove, "a.pt: missing"), (add_a_shard, "b.pt")],
)
def test_damage_is_named(tmp_path, damage, named):
    folder, _ = make_checkpoint(tmp_path, 1)
    damage(folder)
    with pytest.raises(CheckpointError, match=named):
        verify_manifest(folder)


def test_checksums_can_be_left_out_but_sizes_not(tmp_path):
    folder, _ = make_checkpoint(tmp_path, 1)
    flip_a_byte(folder)
    verify_manifest(folder, checksums=False)
    truncate(folder)
    with pytest.raises(CheckpointError, match="5 bytes"):
        verify_manifest(folder, checksums=False)


def test_manifest_cannot_point_outside(tmp_path):
    folder, manifest = make_checkpoint(tmp_path, 1)
    entry = FileEntry(size=0, sha256="")
    write_manifest(folder, dataclasses.replace(manifest, files={"../secret": entry}))
    with pytest.raises(CheckpointError, match="outside"):
        read_manifest(folder)


def test_newest_valid_passes_over_damaged_and_unfinished(tmp_path):
    good, _ = make_checkpoint(tmp_path, 9)
    damaged, _ = make_checkpoint(tmp_path, 10)
    flip_a_byte(damaged)
    (tmp_path / "step_00000011").mkdir()
    (tmp_path / "step_00000012.tmp").mkdir()
    folder, reasons = newest_valid_checkpoint(tmp_path)
    assert folder == good
    assert [str(reason).split(":")[0].rsplit("/", 2)[-2:] for reason in reasons] == [
        [tmp_path.name, "step_00000011"],
        ["step_00000010", "a.pt"],
    ]
    assert newest_valid_checkpoint(tmp_path / "nowhere") == (None, [])
