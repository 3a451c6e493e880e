"""Saving in the background changes nothing but the time it takes, and no refusal or kill costs more than a step.

Four starts of one program, the later ones after a kill; each does several runs with a checkpoint at each step.
"""

import json
import signal

import forked
import pytest
from launching import ENVIRONMENT, HERE, ROOT, curve, metrics, spell
from saved_tensors import differing_tensors, saved_tensors

from ds_dpo.errors import EXIT_STATUS_OF_ERROR

pytestmark = pytest.mark.launch
STEPS = 4
SETTINGS = {
    "config": "miniature",
    "deepspeed_config": "zero2_fp32_cpu",
    "pairs_per_step": 4,
    "micro_batch_pairs": 4,
    "max_train_steps": STEPS,
    "schedule.warmup_steps": 2,
    "schedule.decay_steps": 20,
    "cadence.save_every_steps": 1,
    "cadence.keep_checkpoints": 9,
    "cadence.sample_every_steps": "none",
    "ema.decay": 0.3,
    "reference.refresh_every_steps": 2,
}
FILES_OF_A_SAVE = 5  # weights, moments, average, reference, the UNet's configuration


def case(run, **settings):
    return spell({**SETTINGS, "output_dir": run, **settings})


def start(folder, *cases, faults=""):
    """Do runs one after another in one process; returns its status and what it printed."""
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    command = [str(HERE / "train_cases.py"), str(file)]
    done = forked.run(command, env={**ENVIRONMENT, "DS_DPO_FAULT": faults}, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """The folder of all runs, and what each start ended with and printed."""
    out = tmp_path_factory.mktemp("saving")
    done = [start(out, case(out / "foreground", cadence__save_in_background="false"), case(out / "background"))]
    # the process's second save is refused in its middle; it is killed in the third save of the second run
    faults = f"save.write#{FILES_OF_A_SAVE + 2}=enospc,save.written#{STEPS - 1 + 3}=kill"
    done.append(start(out, case(out / "refused"), case(out / "killed"), faults=faults))
    done.append(start(out, case(out / "killed"), faults="save.manifest=kill"))
    # goes on from step 3 with one save; then a run whose only save is refused, and refused again
    one_step = case(out / "unsaved", max_train_steps=1)
    done.append(start(out, case(out / "killed"), one_step, faults="save.begin#2=erofs,save.begin#3=erofs"))
    return out, done


def assert_equal_to_the_bit(folder, other):
    names = sorted(path.name for path in other.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    shards = [name for name in names if name.endswith(".pt")]
    assert len(shards) == FILES_OF_A_SAVE - 2
    assert differing_tensors(saved_tensors(folder), saved_tensors(other)) == []
    assert (folder / "reference.safetensors").read_bytes() == (other / "reference.safetensors").read_bytes()


def checkpoint(run, step):
    return run / "checkpoints" / f"step_{step:08d}"


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_in_the_background_is_what_the_foreground_saves(starts):
    out, done = starts
    assert done[0][0] == 0, done[0][1]
    for step in range(1, STEPS + 1):
        assert_equal_to_the_bit(checkpoint(out / "background", step), checkpoint(out / "foreground", step))
    assert curve(out / "background") == curve(out / "foreground")
    said = (out / "background" / "log.txt").read_text()
    assert said.count("in the background\n") == STEPS - 1
    assert f"saved {checkpoint(out / 'background', STEPS)} in " in said, "the last one, training waiting"
    assert "in the background" not in (out / "foreground" / "log.txt").read_text()


def test_a_full_disk_costs_one_checkpoint_and_no_step(starts):
    out, _ = starts
    run = out / "refused"
    assert names(run) == ["latest", "step_00000001", "step_00000003", "step_00000004"]
    said = (run / "log.txt").read_text()
    assert f"SAVING FAILED, the last good checkpoint is {checkpoint(run, 1)}: " in said
    assert "No space left on device; training continues" in said
    assert curve(run) == curve(out / "foreground")
    assert metrics(run)[-1]["failed_saves"] == 1
    assert_equal_to_the_bit(checkpoint(run, STEPS), checkpoint(out / "foreground", STEPS))


def test_killed_while_writing_and_again_while_renaming_it_goes_on_from_the_newest_complete_one(starts):
    out, done = starts
    assert [status for status, _ in done[1:3]] == [-signal.SIGKILL] * 2
    assert "resumed from step 2" in done[2][1]
    assert f"completed {checkpoint(out / 'killed', 3)}: its save was interrupted" in done[3][1]
    assert "resumed from step 3" in done[3][1]
    assert curve(out / "killed") == curve(out / "foreground")
    assert names(out / "killed") == ["latest", *(f"step_0000000{step}" for step in range(1, STEPS + 1))]
    for step in range(1, STEPS + 1):
        assert_equal_to_the_bit(checkpoint(out / "killed", step), checkpoint(out / "foreground", step))


def test_a_last_state_that_the_disk_refuses_twice_is_an_error(starts):
    out, done = starts
    status, printed = done[3]
    assert status not in (0, -signal.SIGKILL, EXIT_STATUS_OF_ERROR), "of the program of many starts"
    assert "there is no checkpoint yet: the checkpoint could not be written: [Errno 30]" in printed
    assert "CheckpointError: the checkpoint could not be written: [Errno 30] Read-only file system" in printed
    assert len(metrics(out / "unsaved")) == 1
