"""Which processes a rank came from, read from a made-up /proc."""

import base64

import pytest

from ds_dpo.process.launchers import first_dead, hosts_of_ranks, launchers_of

RANK = 10
NODE = (20, "python3", "python\0-u\0-m\0deepspeed.launcher.launch\0--world_info=x")


def make_proc(folder, *, chain):
    """chain: (pid, name, cmdline) from the rank's parent upwards; each started at 100 + its pid."""
    processes = [(RANK, "python3", "python\0ds_dpo/train.py"), *chain]
    parents = [pid for pid, _, _ in chain] + [0]
    for (pid, name, arguments), parent in zip(processes, parents, strict=True):
        place = folder / str(pid)
        place.mkdir(parents=True)
        fields = ["S", str(parent), *["0"] * 17, str(100 + pid), "0"]
        (place / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")
        (place / "cmdline").write_text(arguments + "\0")
    return folder


@pytest.mark.parametrize(
    ("chain", "pids"),
    [
        ([NODE, (30, "deepspeed", "python\0/venv/bin/deepspeed\0--num_gpus\x002"), (40, "bash", "bash")], [20, 30]),
        ([NODE, (30, "python3", "python\0-m\0deepspeed.launcher.runner"), (40, "x) y", "launch.py")], [20, 30]),
        (
            [NODE, (30, "bash", "bash\0-c\0cd x; python"), (40, "sshd-session", "sshd: me"), (1, "init", "i")],
            [20, 30, 40],
        ),
        ([NODE, (30, "bash", "bash\0run_deepspeed.sh"), (1, "init", "init")], [20]),
        ([NODE], [20]),
        ([(30, "torchrun", "python\0/venv/bin/torchrun\0--nproc"), (40, "bash", "bash")], [30]),
        ([(30, "pt_elastic", "python\0-m\0torch.distributed.run"), (40, "bash", "bash")], [30]),
        ([(30, "slurmstepd", "slurmstepd: [7.0]"), (1, "init", "init")], [30]),
        ([(30, "bash", "-bash"), (1, "init", "init")], []),
        ([(1, "init", "init")], []),
        ([], []),
    ],
)
def test_a_rank_has_the_launchers_that_end_with_its_launch(tmp_path, chain, pids):
    assert [process.pid for process in launchers_of(RANK, proc=make_proc(tmp_path, chain=chain))] == pids


def test_deepspeeds_launcher_was_told_each_ranks_host(tmp_path):
    told = base64.urlsafe_b64encode(b'{"n1": [0, 1], "n2": [3]}').decode()
    node = (20, "python3", f"python\0-u\0-m\0deepspeed.launcher.launch\0--world_info={told}\0--node_rank=0")
    assert hosts_of_ranks(RANK, proc=make_proc(tmp_path / "one", chain=[node])) == ["n1", "n1", "n2"]
    assert hosts_of_ranks(RANK, proc=make_proc(tmp_path / "two", chain=[(30, "bash", "-bash")])) is None


def test_a_launcher_is_dead_once_it_waits_to_be_reaped_or_its_id_is_another_s(tmp_path):
    proc = make_proc(tmp_path, chain=[NODE, (30, "deepspeed", "python\0deepspeed")])
    launchers = launchers_of(RANK, proc=proc)
    assert first_dead(launchers, proc=proc) is None
    stat = proc / "30" / "stat"
    text = stat.read_text()
    stat.write_text(text.replace(") S", ") Z"))
    assert first_dead(launchers, proc=proc).pid == 30
    stat.write_text(text.replace(" 130 ", " 131 "))
    assert first_dead(launchers, proc=proc).pid == 30
    (proc / "20" / "stat").unlink()
    assert first_dead(launchers, proc=proc).pid == 20
