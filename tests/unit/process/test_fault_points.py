"""Fault points do what they are asked, to whom they are asked, and each of the table is somewhere in the program."""

import ast
import errno
import signal
import subprocess
import sys

import pytest
from repository import PACKAGE

from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.errors import ConfigError
from ds_dpo.process import fault_points
from ds_dpo.process.fault_points import FAULT_POINTS, reach, read_faults
from ds_dpo.run_folder.log import RunLog
from ds_dpo.train import _shout_of_faults


@pytest.fixture
def arm(monkeypatch):
    def arm(text, *, rank="0"):
        monkeypatch.setattr(fault_points, "_faults", read_faults(text))
        monkeypatch.setenv("RANK", rank)

    return arm


def test_every_point_of_the_table_is_reached_somewhere_and_no_other():
    reached = [
        node.args[0].value
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "reach"
    ]
    assert set(reached) == set(FAULT_POINTS)


def test_only_the_named_rank_and_only_at_the_count(arm):
    arm("save.write@1#3=enospc", rank="0")
    for _ in range(4):
        reach("save.write")
    arm("save.write@1#3=enospc", rank="1")
    reach("save.write")
    reach("save.begin")
    reach("save.write")
    with pytest.raises(OSError) as raised:
        reach("save.write")
    assert raised.value.errno == errno.ENOSPC
    reach("save.write")  # the fourth time goes well


def test_several_faults_each_with_its_own_count(arm):
    arm("save.begin=erofs, save.begin#2=edquot,save.copied=eio")
    found = []
    for name in ("save.begin", "save.begin", "save.copied"):
        with pytest.raises(OSError) as raised:
            reach(name)
        found.append(raised.value.errno)
    assert found == [errno.EROFS, errno.EDQUOT, errno.EIO]


def test_killed_as_the_environment_says():
    code = """from ds_dpo.process.fault_points import reach
reach('step.begin')
print('lives', flush=True)
reach('step.begin')"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={"DS_DPO_FAULT": "step.begin#2=kill"}, cwd=PACKAGE.parent, capture_output=True
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"lives\n")
    assert done.stderr == b"fault point step.begin, rank 0: kill\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("save.wrote=kill", r"no name 'save\.wrote'; step\.begin, .*save\.write, .* would fit"),
        ("save.write=explode", "no action 'explode'; kill, hang, enospc, .* would fit"),
        ("save.write", r"'save\.write' must be NAME"),
        ("save.write#0=kill", "must be NAME"),
        ("save.write@one=kill", "must be NAME"),
    ],
)
def test_a_mistyped_fault_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        read_faults(text)


def test_a_variable_that_was_left_set_is_shouted(monkeypatch):
    assert fault_points.warnings() == []
    monkeypatch.setattr(fault_points, "_faults", read_faults("save.write@1#2=kill"))
    (line,) = fault_points.warnings()
    assert line.startswith("WARNING: DS_DPO_FAULT IS SET")
    assert "kill at save.write" in line


@pytest.mark.parametrize("rank", [0, 3])
def test_each_rank_that_has_the_variable_says_so(monkeypatch, capfd, rank):
    """It may be left on one host alone, and rank 0's log is then silent."""
    monkeypatch.setattr(fault_points, "_faults", read_faults("save.write=kill"))
    place = RankEnvironment(
        rank=rank, world_size=4, local_rank=0, local_world_size=1, master_addr="127.0.0.1", master_port=1
    )
    _shout_of_faults(place, RunLog(speaks=rank == 0))
    said = capfd.readouterr()
    assert (said.out + said.err).count("WARNING: DS_DPO_FAULT IS SET") == 1
    assert rank == 0 or said.err.startswith("rank 3 on ")
