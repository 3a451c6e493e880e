"""A checkpoint belongs to its run: another's is passed over by name, and refused if there is no other."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_run import Run

from ds_dpo.checkpoints.identity import RunIdentity
from ds_dpo.config.identity import fingerprint, identity
from ds_dpo.config.load import load_config
from ds_dpo.errors import CheckpointError


def identity_with(*options: str, **others: Any) -> RunIdentity:
    fields = identity(load_config(["--config", "miniature", *options]).config, "bf16")
    return RunIdentity(
        world_size=1, stage=2, precision="bf16", fingerprint=fingerprint(fields), config=fields, **others
    )


def at_step(run: Run, identity: RunIdentity, step: int) -> None:
    run.identity = identity
    run.save(step)


OTHERS = {
    "seed": (("--seed", "3"), "seed: 3 -> 0"),
    "beta": (("--objective.beta", "7"), "objective.beta: 7.0 -> 500.0"),
    "rate": (("--learning_rate", "1e-3"), "optimizer.learning_rate: 0.001 -> "),
    "data": (("--data.max_rows", "8"), "data.max_rows: 8 -> None"),
    "objective": (("--objective.type", "ipo", "--objective.beta", "5"), "objective.type: ipo -> dpo"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_one_of_another_run_is_passed_over_by_name_with_what_differs(run: Run, case: str) -> None:
    options, difference = OTHERS[case]
    at_step(run, identity_with(), 1)
    at_step(run, identity_with(*options), 2)
    run.identity = identity_with()
    assert run.loaded() == {"step": 1}
    (line,) = run.said
    assert line.startswith(f"skipped: {run.folder}/step_00000002 belongs to another run, which differs in ")
    assert difference in line
    shutil.rmtree(run.folder / "step_00000001")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*step_00000002 belongs to another"):
        run.store().load_newest()


@pytest.mark.parametrize("other", [{"world_size": 4}, {"stage": 3}])
def test_on_another_layout_too(run: Run, other: dict[str, int]) -> None:
    at_step(run, identity_with("--seed", "3"), 2)
    with pytest.raises(CheckpointError, match="seed: 3 -> 0"):
        run.store(identity=replace(identity_with(), **other)).load_newest()


def test_a_change_that_the_run_allows_is_allowed_here(run: Run) -> None:
    at_step(run, identity_with("--seed", "3"), 2)
    run.identity = replace(identity_with(), accepted=["seed"])
    assert run.loaded() == {"step": 2}


def test_another_fingerprint_alone_is_refused(run: Run) -> None:
    """As an earlier version wrote it, which did not name the fields; and one that contradicts its own fields."""
    at_step(run, identity_with(), 1)
    path = run.folder / "step_00000001" / "manifest.json"
    told = json.loads(path.read_text())
    for claimed in ({"fingerprint": 64 * "0"}, {"fingerprint": 64 * "0", "run": None}, {"fingerprint": ""}):
        run.claim(1, **claimed)
        with pytest.raises(
            CheckpointError, match=r"belongs to another run: its fingerprint is '0*', and this run's is"
        ):
            run.store().load_newest()
        path.write_text(json.dumps(told))
    assert run.loaded() == {"step": 1}


# of the miniature in bf16, as the version before the comparison wrote it
EARLIER = "49d3f23cce4cb582eeaac00a5bcd99a0767ee7c20dc4b1a3c484e059cac8e552"


def test_one_of_an_earlier_version_is_the_same_runs(run: Run) -> None:
    at_step(run, identity_with(), 1)
    path = run.folder / "step_00000001" / "manifest.json"
    told = json.loads(path.read_text())
    del told["run"]
    path.write_text(json.dumps({**told, "fingerprint": EARLIER}))
    assert run.loaded() == {"step": 1}
    run.identity = identity_with("--seed", "3")
    with pytest.raises(CheckpointError, match=r"belongs to another run: its fingerprint is '49d3f23cce4c'"):
        run.store().load_newest()


def test_a_field_that_came_later_is_no_difference_at_its_default(run: Run) -> None:
    saved = {name: value for name, value in identity_with().config.items() if name != "ema.decay"}
    at_step(run, identity_with(), 1)
    run.claim(1, run={"config": saved}, fingerprint=fingerprint(saved))
    own = identity_with()
    later = replace(own, config={**own.config, "ema.decay": None, "later.switch": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_dpo.config.identity.FIRST_FIELDS", frozenset(saved))
        run.identity = later
        assert run.loaded() == {"step": 1}
        run.identity = replace(later, config={**later.config, "ema.decay": 0.9})
        with pytest.raises(CheckpointError, match=r"ema.decay: None -> 0\.9"):
            run.store().load_newest()


MODELS = {"models": {"vae": "a" * 64, "denoiser": "b" * 64}}


def test_contents_are_compared_as_far_as_both_name_them(run: Run) -> None:
    at_step(run, identity_with(contents=MODELS), 1)
    run.identity = identity_with(contents={"models": {"denoiser": "b" * 64, "text_encoder": "c" * 64}, "data": {}})
    assert run.loaded() == {"step": 1}
    run.identity = identity_with(contents={"models": {**MODELS["models"], "vae": "d" * 64}})
    with pytest.raises(CheckpointError, match=r"differs in models\.vae: a{64} -> d{64} "):
        run.store().load_newest()


@pytest.mark.parametrize(
    ("claimed", "said"),
    [
        ({"step": 9}, "says that it is step 9, but its folder is step_00000001"),
        ({"world_size": 0}, "world_size is 0, not a whole number from 1 to 1000000"),
        ({"world_size": -3}, "world_size is -3"),
        ({"world_size": 10**9}, "world_size is 1000000000, not"),
        ({"world_size": 1.5}, r"world_size is 1\.5"),
        ({"world_size": True}, "world_size is True"),
        ({"step": float("inf")}, "step is inf"),
        ({"step": "1"}, "step is '1', not a whole number"),
        ({"stage": None}, "stage is None"),
        ({"stage": 7}, "stage is 7, not a whole number from 0 to 3"),
        ({"files": {}}, "it lists no file"),
        ({"files": {"x" * 300: {"size": 1, "sha256": ""}}}, "xxx' is outside of the checkpoint, or no name of a file"),
        ({"format": "9" * 10**6}, "format '999"),
        ({"run": [1]}, "not a manifest of this project"),
        ({"run": {"config": 3}}, "not a manifest of this project"),
    ],
)
def test_a_manifest_that_cannot_be_true_is_refused(run: Run, claimed: dict[str, Any], said: str) -> None:
    run.save(1)
    run.claim(1, **claimed)
    with pytest.raises(CheckpointError, match=said) as refused:
        run.store().load_newest()
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_a_folder_of_another_step_is_passed_over(run: Run) -> None:
    """A copy of an old checkpoint under a newer name would be taken for the newest."""
    run.save(1, 2)
    copied: Path = shutil.copytree(run.folder / "step_00000001", run.folder / "step_00000009")
    assert run.loaded() == {"step": 2}
    assert f"skipped: {copied}/manifest.json: says that it is step 1" in run.said[0]


def test_a_state_of_another_step_is_passed_over(run: Run) -> None:
    """Folder and manifest may be renamed alike; the state itself says of which step it is."""
    run.save(1, 2)
    copied: Path = shutil.copytree(run.folder / "step_00000001", run.folder / "step_00000009")
    run.claim(9, step=9)
    assert run.loaded() == {"step": 2}
    said = "its manifest.json says that it is step 9, but the state in it is of step 1; one of them was altered"
    assert run.said == [f"skipped: {copied}: {said}"]
    with pytest.raises(CheckpointError, match="but the state in it is of step 1"):
        run.store().load_step(9)


UNREADABLE = {
    "pipe": (os.mkfifo, "is a named pipe, not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
    "folder": (Path.mkdir, "Is a directory"),
    "not text": (lambda path: path.write_bytes(b"\xff"), "UTF-8|utf-8"),
    "too large": (lambda path: path.write_bytes(b" " * (2**26 + 1)), "is larger than"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "never completed|No such file"),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("name", ["step_00000001/manifest.json", "latest"])
def test_what_is_no_text_file_is_named_and_not_waited_for(run: Run, case: str, name: str) -> None:
    make, said = UNREADABLE[case]
    run.save(1)
    if name == "latest":
        shutil.rmtree(run.folder / "step_00000001")
    (run.folder / name).unlink()
    make(run.folder / name)
    with pytest.raises(CheckpointError, match=said) as refused:
        run.store().load_newest()
    assert str(run.folder) in str(refused.value)
    assert "\n" not in str(refused.value)
