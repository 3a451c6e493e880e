"""The fault matrix's table, and what it holds the product against; the matrix itself is run by hand."""

import hashlib
import json
import shutil

import fault_run
import pytest
from fault_cases import DAMAGES, SETUPS, cases, kills
from fault_moves import Signal
from fault_page import page, read_results, summary

from ds_dpo.process.fault_points import FAULT_POINTS, read_faults

EVERY = cases()
OPTIM = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def test_the_table_has_what_was_promised():
    assert len(EVERY) >= 60
    assert len([case for case in kills() if isinstance(case.moves[-1], Signal)]) >= 20
    killed = {fault.name for case in EVERY.values() for fault in read_faults(case.faults) if fault.action == "kill"}
    assert killed == FAULT_POINTS.keys()
    assert {case.damage for case in EVERY.values()} >= DAMAGES.keys() == fault_run.DAMAGE.keys()
    assert {case.setup for case in EVERY.values()} == SETUPS.keys()


@pytest.fixture
def checkpoints(tmp_path):
    """Three checkpoints of two ranks, and what a save left that was cut off."""
    for step in (3, 6, 9):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        contents = {OPTIM.format(rank): bytes([step, rank]) * 50 for rank in (0, 1)}
        contents["mp_rank_00_model_states.pt"] = bytes([step]) * 200
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        files = {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        }
        (folder / "manifest.json").write_text(json.dumps({"step": step, "files": files}))
    (tmp_path / "partial_step_00000012").mkdir()
    (tmp_path / "latest").write_text("step_00000009\n")
    return tmp_path


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_costs_what_the_table_says(checkpoints, name):
    fault_run.DAMAGE[name](checkpoints)
    costs = DAMAGES[name]
    assert fault_run.newest_valid(checkpoints) == (None if costs is None else 9 - 3 * costs)


@pytest.mark.parametrize("name", [name for name, costs in DAMAGES.items() if costs is not None])
def test_a_damage_is_done_to_what_is_valid(checkpoints, name):
    """An earlier case's damage may still be there under its name."""
    shutil.copytree(checkpoints / "step_00000009", checkpoints / "step_00000012")
    (checkpoints / "step_00000012" / "mp_rank_00_model_states.pt").write_bytes(b"cut")
    fault_run.DAMAGE[name](checkpoints)
    assert fault_run.newest_valid(checkpoints) == 9 - 3 * DAMAGES[name]


def test_a_run_that_has_too_few_checkpoints_for_a_damage_begins_anew(checkpoints, tmp_path_factory):
    """As when only the damages are played: each costs a checkpoint, and few starts save another."""
    seed = tmp_path_factory.mktemp("run") / "seed"
    shutil.copytree(checkpoints, seed)
    begun_anew = 0
    for name, costs in DAMAGES.items():
        if not fault_run.has_enough(checkpoints, costs=costs or 0):
            begun_anew += 1
            shutil.rmtree(checkpoints)
            shutil.copytree(seed, checkpoints)
        before = fault_run.valid_steps(checkpoints)
        fault_run.DAMAGE[name](checkpoints)
        assert fault_run.valid_steps(checkpoints) == ([] if costs is None else before[costs:])
    # of 3 checkpoints two may be lost: anew before the 3rd, 5th and 7th damage of one, before that of two, and for the
    # last, as the one before it left none
    assert begun_anew == 5


def test_what_was_saved_or_said_to_be_must_be_there():
    assert list(fault_run.losses(9, 12, "stopped at step 12 as asked")) == []
    assert list(fault_run.losses(9, 9, "")) == []
    assert list(fault_run.losses(None, None, "")) == []
    assert list(fault_run.losses(9, 6, "")) == ["step 9 was saved before, and now the newest is 6"]
    assert list(fault_run.losses(9, None, "")) == ["step 9 was saved before, and now the newest is None"]
    (loss,) = fault_run.losses(9, 9, "stopped at step 12 as asked")
    assert loss.startswith("it says that it stopped at step 12")


def test_a_damaged_checkpoint_is_replaced_before_one_is_left_without_its_name():
    """A whole one without its name is the newest valid one, and not what a damage is done to."""
    names = list(EVERY)
    assert names.index("killed at save.moved_old@0") < names.index("killed at save.manifest@0")


def test_a_complete_checkpoint_counts_before_it_has_its_name(checkpoints):
    newest = checkpoints / "step_00000009"
    newest.rename(checkpoints / "partial_step_00000009")
    assert fault_run.newest_valid(checkpoints) == 9


def test_a_curve_must_have_each_step_once_and_to_the_bit():
    lines = [{"step": step, "loss": 1 / step, "pairs_seen": 4 * step} for step in (1, 2, 3)]
    assert fault_run.difference(lines[:2], lines) is None
    assert "step 3: loss" in (fault_run.difference([*lines[:2], {**lines[2], "loss": 0.3333}], lines) or "")
    assert fault_run.difference([lines[0], lines[0], *lines[1:]], lines) == "line 2 of metrics.jsonl is step 1"
    assert fault_run.difference([lines[0], lines[2]], lines) == "line 2 of metrics.jsonl is step 3"
    assert fault_run.difference([*lines, lines[2]], lines) is not None


def test_the_page_tells_what_failed():
    first, second = list(EVERY)[:2]
    common = {"group": "kills", "within": 30.0, "status": 247, "resumed": 9, "commit": "abc", "date": "2026-01-01"}
    good = {**common, "name": first, "seconds": 4.2, "is_curve_equal": True, "orphans": 0, "seen": "", "passed": True}
    bad = {**good, "name": second, "orphans": 2, "seen": "left after 30 s", "passed": False}
    total = summary(EVERY, {first: good, second: bad})
    assert (total["cases"], total["passed"], total["orphans"], total["failed"]) == (2, 1, 2, [second])
    text = page(EVERY, {first: good, second: bad})
    assert f"| {first} | 4.2 s | 30 s | 247 | 9 | yes |  |" in text
    apart = {**good, "ranks_within": 30.0, "ranks_seconds": 2.5}
    assert f"| {first} | 4.2 s, ranks 2.5 s | 30 s |" in page(EVERY, {first: apart})
    broken_off = {**apart, "seconds": None, "ranks_seconds": None, "seen": "it left", "passed": False}
    assert f"| {first} |  | 30 s |" in page(EVERY, {first: broken_off})
    assert f"- {second}: left after 30 s" in text


def test_a_case_that_was_broken_off_does_not_replace_an_earlier_result(tmp_path):
    played = {"name": "a", "resumed": 9, "seen": "", "passed": True}
    broken_off = {"name": "a", "resumed": None, "seen": "", "passed": False}
    failed = {"name": "a", "resumed": None, "seen": "no later start went on", "passed": False}
    for rows, last in (([played, broken_off], played), ([played, failed], failed), ([broken_off], broken_off)):
        path = tmp_path / "results.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        assert read_results(path) == {"a": last}
