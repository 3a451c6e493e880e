"""Run programs as forks of one process that has imported everything, because importing takes 15 s of a processor.

A program starts as by its path in a process of its own, with its own environment, folder and output. Tests of a start
itself (what is imported when, what is printed first, DeepSpeed's launcher) start real processes.
"""

import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from unittest import mock

from ds_dpo.process import fault_points
from ds_dpo.process.quiet import QUIET_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which imports torch's compiler, 4 s
    "deepspeed.runtime.zero.partition_parameters",
    "datasets",
    "transformers.models.clip.modeling_clip",
    "diffusers.models.unets.unet_2d_condition",
    "tensorboard.summary.writer.event_file_writer",
    "deepspeed.ops.op_builder.all_ops",
    "diffusers.optimization",
    "ds_dpo.training.assembly",
    "ds_dpo.encoding.cache.program",
    "ds_dpo.export.consolidate",
)
# what libraries read when they are imported
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONPATH": str(ROOT),
    **QUIET_ENVIRONMENT,
}
FORKS = multiprocessing.get_context("forkserver")


def run(
    command: Sequence[str], *, env: Mapping[str, str], cwd: Path | str = ROOT, ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run [program.py, arguments...] to its end on so many ranks, with the variables that DeepSpeed's launcher sets.

    A rank that fails ends the others, as under the launcher; its status is returned.
    """
    forks_of_one()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        places = [{**env, **place} for place in rank_places(ranks)] if ranks > 1 else [dict(env)]
        forks = [FORKS.Process(target=become, args=(list(command), place, str(cwd), files)) for place in places]
        for fork in forks:
            fork.start()
        status = wait(forks)
        out, error = (file.read_text() for file in files)
    return subprocess.CompletedProcess(list(command), status, out, error)


def forks_of_one() -> ForkServerContext:
    """Return the context of multiprocessing whose processes are forks of the one that has imported everything."""
    with mock.patch.dict(os.environ, ENVIRONMENT):
        FORKS.set_forkserver_preload(list(IMPORTED))
        forkserver.ensure_running()
    return FORKS


def rank_places(ranks: int) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def become(command: list[str], environment: dict[str, str], folder: str, files: list[Path]) -> None:
    """Turn this process into the program's; it ends with the tests."""
    threading.Thread(target=die_with_tests, daemon=True).start()
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(fault_points)  # which reads its variable when it is imported
    os.chdir(folder)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    runpy.run_path(command[0], run_name="__main__")


def die_with_tests() -> None:
    """Wait for the end of the process of tests, and kill this one, whose own parent is the process that imports."""
    tests = multiprocessing.parent_process()
    assert tests is not None
    connection.wait([tests.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def wait(forks: list[ForkServerProcess]) -> int:
    running = list(forks)
    while running:
        connection.wait([fork.sentinel for fork in running])
        for fork in [fork for fork in running if not fork.is_alive()]:
            running.remove(fork)
            if fork.exitcode:
                for other in running:
                    other.kill()
                for other in running:
                    other.join()
                return fork.exitcode
    return 0
