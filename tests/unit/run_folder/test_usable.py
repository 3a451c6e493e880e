"""A run folder that cannot be used is refused by name, and looking at it leaves nothing behind."""

import os
from pathlib import Path

import pytest

from ds_dpo.errors import ConfigError
from ds_dpo.run_folder.usable import require_usable


def prepare(folder: Path, kind: str) -> Path:
    """Return an output_dir of a kind; what a kind is named after is in `folder`."""
    run = folder / "run"
    if kind == "a file":
        run.touch()
    elif kind == "below a file":
        (folder / "file").touch()
        run = folder / "file" / "runs" / "x"
    elif kind == "a link to nothing":
        run.symlink_to(folder / "nothing")
    elif kind == "a device":
        run = Path("/dev/null")
    elif kind == "no folder can be made":
        run = Path("/proc/none/x")
    elif kind == "checkpoints is a file":
        run.mkdir()
        (run / "checkpoints").touch()
    elif kind == "checkpoints leads nowhere":
        run.mkdir()
        (run / "checkpoints").symlink_to("/proc/none")
    elif kind == "log.txt is a folder":
        (run / "log.txt").mkdir(parents=True)
    elif kind == "metrics.jsonl is a pipe":
        run.mkdir()
        os.mkfifo(run / "metrics.jsonl")
    return run


UNUSABLE = {
    "a file": "run is a file, not a folder",
    "below a file": "file is a file, not a folder",
    "a link to nothing": "run is a link that leads nowhere, not a folder",
    "a device": "/dev/null is a device or a pipe, not a folder",
    "no folder can be made": "/proc cannot be written",
    "checkpoints is a file": "run/checkpoints is a file, not a folder",
    "checkpoints leads nowhere": "run/checkpoints is a link that leads nowhere, not a folder",
    "log.txt is a folder": "run/log.txt is a folder, not a file",
    "metrics.jsonl is a pipe": "run/metrics.jsonl is a device or a pipe, not a file",
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_cannot_hold_a_run_is_named(tmp_path: Path, kind: str) -> None:
    run = prepare(tmp_path, kind)
    with pytest.raises(ConfigError) as caught:
        require_usable(run)
    message = str(caught.value)
    assert message.startswith(f"output_dir {str(run)!r}: ")
    assert UNUSABLE[kind] in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("inner", ["", "checkpoints"])
def test_a_folder_without_permission_is_named(tmp_path: Path, inner: str) -> None:
    place = tmp_path / "run" / inner
    place.mkdir(parents=True)
    place.chmod(0o555)
    with pytest.raises(ConfigError, match=r"cannot be written \(Permission denied\)"):
        require_usable(tmp_path / "run")


@pytest.mark.parametrize("made", ["nothing", "folder", "checkpoints"])
def test_a_usable_folder_is_left_as_it_was(tmp_path: Path, made: str) -> None:
    run = tmp_path / "runs" / "x"
    if made != "nothing":
        (run / made).mkdir(parents=True)
        (run / "log.txt").write_text("one\n")
    before = sorted(tmp_path.rglob("*"))
    require_usable(run)
    assert sorted(tmp_path.rglob("*")) == before
