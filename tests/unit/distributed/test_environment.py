"""Who a process is under each launcher."""

import os
from pathlib import Path

import pytest

from ds_dpo.distributed.environment import (
    RankEnvironment,
    export_environment,
    local_rank_in,
    rank_in,
    read_environment,
)
from ds_dpo.errors import ConfigError

DEEPSPEED = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "8",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29501",
}
TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29501",
}
SRUN = {
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "node0,node1",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
TENTH_OF_16 = RankEnvironment(
    rank=9, world_size=16, local_rank=1, local_world_size=8, master_addr="node0", master_port=29501
)


def test_deepspeed_and_torchrun_say_the_same_in_their_own_words() -> None:
    assert read_environment(DEEPSPEED) == TENTH_OF_16
    assert read_environment(TORCHRUN) == TENTH_OF_16
    assert read_environment({**SRUN, **TORCHRUN}) == TENTH_OF_16, "torchrun inside of a SLURM job"


def test_srun_alone_is_enough() -> None:
    found = read_environment(SRUN)
    assert found == read_environment({**SRUN, "SLURM_PROCID": "9"})
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (9, 16, 1, 8)
    assert (found.master_addr, found.master_port) == ("node0", 20000 + 41234 % 20000)
    given = read_environment({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"})
    assert (given.master_addr, given.master_port) == ("10.0.0.1", 5000)


@pytest.mark.parametrize(
    ("tasks", "node", "expected"),
    [("8,4", 0, 8), ("8,4", 1, 4), ("8(x2),4", 1, 8), ("8(x2),4", 2, 4), ("2(x8)", 7, 2), ("8(x300000000)", 7, 8)],
)
def test_nodes_may_hold_unequal_numbers_of_tasks(tasks: str, node: int, expected: int) -> None:
    environ = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)}
    assert read_environment(environ).local_world_size == expected


def test_a_short_list_of_hosts_is_read_by_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {**SRUN, "SLURM_STEP_NODELIST": "gpu[07-08]"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"SLURM_STEP_NODELIST='gpu\[07-08\]'.*set MASTER_ADDR"):
        read_environment(environ)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && echo gpu07 && echo gpu08\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert read_environment(environ).master_addr == "gpu07"
    scontrol.write_text("#!/bin/sh\n")
    with pytest.raises(ConfigError, match=r"scontrol names no host of SLURM_STEP_NODELIST=.*; set MASTER_ADDR"):
        read_environment(environ)


def test_without_a_launcher_it_is_the_only_rank() -> None:
    found = read_environment({"PATH": "/bin", "SLURM_JOB_ID": "1"})  # a batch script outside of srun is one process
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (0, 1, 0, 1)
    assert found.master_addr == "127.0.0.1"


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RANK": "0"}, "not WORLD_SIZE, LOCAL_RANK; start with"),
        ({"WORLD_SIZE": "2"}, "not RANK, LOCAL_RANK; start with"),
        ({**TORCHRUN, "RANK": "first"}, "RANK='first', which must be a whole number"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8x2"}, r"SLURM_STEP_TASKS_PER_NODE='8x2'.*must be like 8\(x2\),4"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8(x9999999999)"}, r"must be like 8\(x2\),4"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "-8"}, r"must be like 8\(x2\),4"),
        ({**TORCHRUN, "RANK": "9" * 5000}, "RANK='9999.*, which must be a whole number"),
        ({**TORCHRUN, "RANK": "16"}, "rank 16 of 16, .*: ranks count from 0 to below their number; start with"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "the number of ranks must be 1 or more"),
        ({**TORCHRUN, "LOCAL_RANK": "8"}, "ranks of a node count from 0 to below their number"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "17"}, "a node has 1 rank or more, and not more than there are"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "a node has 1 rank or more, and not more than there are"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "a port is a number from 1 to 65535"),
        ({**TORCHRUN, "MASTER_ADDR": " "}, "the first node must have a name"),
        ({**SRUN, "SLURM_STEP_NODELIST": "-a[1-2]"}, r"'-a\[1-2\]' is no list of hosts; set MASTER_ADDR"),
    ],
)
def test_half_an_environment_is_refused(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_environment(environ)


def test_what_is_exported_reads_back_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    exported: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", exported)
    export_environment(TENTH_OF_16)
    assert read_environment(exported) == TENTH_OF_16


@pytest.mark.parametrize(
    ("environ", "rank", "local_rank"),
    [
        (DEEPSPEED, 9, 1),
        (TORCHRUN, 9, 1),
        (SRUN, 9, 1),
        ({**SRUN, **TORCHRUN, "RANK": "3", "LOCAL_RANK": "2"}, 3, 2),  # torchrun inside of a SLURM job
        ({**SRUN, "WORLD_SIZE": "16"}, 0, 0),  # read_environment refuses it; until then somebody must speak
        ({"SLURM_PROCID": "9", "SLURM_LOCALID": "1"}, 0, 0),  # a batch script outside of srun
        ({}, 0, 0),
    ],
)
def test_the_rank_alone_is_known_at_once(
    environ: dict[str, str], rank: int, local_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # it asks no scontrol for the hosts
    environ = {**environ, "SLURM_STEP_NODELIST": "gpu[07-08]"}
    assert (rank_in(environ), local_rank_in(environ)) == (rank, local_rank)


def test_a_rank_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="RANK='first', which must be a whole number"):
        rank_in({"RANK": "first"})


BARE = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_TASKS_PER_NODE"}  # 16 tasks, node 1


@pytest.mark.parametrize(
    ("further", "local_size"),
    [
        ({"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"SLURM_NODEID": "0"}, 16),
        ({"SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_STEP_TASKS_PER_NODE": ""}, 16),
    ],
)
def test_without_slurms_list_equal_nodes_are_known_by_their_number(further: dict[str, str], local_size: int) -> None:
    assert read_environment({**BARE, **further}).local_world_size == local_size


@pytest.mark.parametrize(
    "further",
    [
        {},
        {"SLURM_NNODES": "2"},
        {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "9"},
        {"SLURM_NNODES": "1"},
        {"SLURM_STEP_TASKS_PER_NODE": "16"},
    ],
)
def test_a_node_whose_tasks_nothing_says_is_refused_by_the_variables_name(further: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"SLURM_STEP_TASKS_PER_NODE.*start with srun"):
        read_environment({**BARE, **further})
