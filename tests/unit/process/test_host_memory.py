"""What a host has left is the least of what the machine and each group around the process leave."""

from pathlib import Path

from ds_dpo.process.host_memory import available_bytes


def test_the_tightest_limit_counts(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "sys/fs/cgroup"
    step = cgroup / "slurm/job_7/step_0"
    (proc / "self").mkdir(parents=True)
    step.mkdir(parents=True)
    (cgroup / "memory.max").write_text("1\n")  # of a group that the process is not in: it would be the least
    (proc / "meminfo").write_text("MemTotal: 64 kB\nMemFree: 1 kB\nMemAvailable:   32 kB\n")
    assert available_bytes(tmp_path) == 32 * 1024
    (proc / "self/cgroup").write_text("4:memory:/old\n0::/slurm/job_7/step_0\n")
    (step / "memory.max").write_text("max\n")
    (step / "memory.current").write_text("9000\n")
    assert available_bytes(tmp_path) == 32 * 1024
    job = step.parent
    (job / "memory.max").write_text("20000\n")
    (job / "memory.current").write_text("15000\n")
    (job / "memory.stat").write_text("anon 100\nactive_file 300\ninactive_file 4000\n")
    assert available_bytes(tmp_path) == 20000 - 15000 + 4000


def test_nothing_is_known_where_nothing_says_it(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
