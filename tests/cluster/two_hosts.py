"""The bench of bench/README.md from Python: start it, run things on its hosts, see what is left there."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CANNOT = 77  # start-cluster's status where a machine cannot have a bench
NODES = ("n1", "n2")
HOSTS = ("head", *NODES)
# one thread a rank; a plain checkout's code goes before an installed one
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT),
    # over ssh DeepSpeed sends no PATH of its own, and its CPU backend is built anew by another ninja
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


class CannotHaveBenchError(Exception):
    """This machine has no root, namespaces or packages; the message says which."""


class Bench:
    """head, n1 and n2 with all of their state in a folder, made where none is given."""

    def __init__(self, folder=None):
        self._is_own = folder is None
        # it holds sockets, whose paths must be short
        self.folder = Path(tempfile.mkdtemp(prefix="bench_")) if folder is None else Path(folder)
        self._at_rest = {}

    def start(self, **settings):
        """Bring it up, or up again; it ends with this process, if not before.

        Raises CannotHaveBenchError, and RuntimeError where it should work and does not.
        """
        settings = {"DSC_OWNER": os.getpid(), **settings}
        environ = {**ENVIRONMENT, **{name: str(value) for name, value in settings.items()}}
        done = self._program("start-cluster", environ=environ)
        if done.returncode == CANNOT:
            raise CannotHaveBenchError(done.stderr.strip())
        if done.returncode != 0:
            raise RuntimeError(f"start-cluster: status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        self._at_rest = {host: set(self._all_processes(host)) for host in HOSTS}

    def stop(self):
        """End every process of every host; a folder of its own goes too."""
        done = self._program("stop-cluster", environ=ENVIRONMENT)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        if self._is_own:
            shutil.rmtree(self.folder)

    def _program(self, name, *, environ):
        return subprocess.run(
            [HERE / "bench" / name], env={**environ, "DSC_DIR": str(self.folder)}, capture_output=True, text=True
        )

    def command(self, host, *command):
        return [str(HERE / "bench" / "on"), host, *map(str, command)]

    def environ(self, **changes):
        return {**ENVIRONMENT, "DSC_DIR": str(self.folder), **changes}

    def run(self, host, *command, environ=None, cwd=ROOT, timeout=300):
        """Run a command on a host to its end; stdout and stderr together are its `stdout`."""
        return subprocess.run(
            self.command(host, *command),
            env=self.environ(**(environ or {})),
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def check(self, host, *command, **options):
        """Run a command that must succeed; return what it said."""
        done = self.run(host, *command, **options)
        assert done.returncode == 0, f"{command}: status {done.returncode}: {done.stdout[-3000:]}"
        return done.stdout

    def first_process(self, host):
        """The pid of a host's first process, as the machine sees it: to kill it is to switch the host off."""
        return int((self.folder / f"{host}.pid").read_text().split()[0])

    def left_over(self, host):
        """The processes of a host that it had not when it came up, as `PID COMMAND`."""
        return sorted(set(self._all_processes(host)) - self._at_rest[host])

    def _all_processes(self, host):
        lines = self.check(host, "ps", "-ww", "-eo", "pid=,args=").splitlines()
        # its own: what shows them, and how a first process waits
        return [line.strip() for line in lines if not line.endswith(("pid=,args=", "sleep 3600"))]

    def require_quiet(self, hosts=HOSTS, *, within=30):
        """Raise AssertionError naming every process that is left on a host after `within` seconds."""
        until = time.monotonic() + within
        while left := {host: found for host in hosts if (found := self.left_over(host))}:
            assert time.monotonic() < until, f"left over: {left}"
            time.sleep(0.2)
