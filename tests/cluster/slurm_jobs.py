"""Batch scripts of scripts/slurm in the queue of the bench."""

import time

SCRIPTS = ("train", "train_launcher")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
SIZE = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=60")


class Job:
    """One start of a batch script, with arguments of train.py."""

    def __init__(self, bench, script, printed, arguments, *, options=(), environ=None):
        """printed: where its output goes. options: of sbatch, beside SIZE."""
        self._bench, self._printed = bench, printed
        command = ["sbatch", "--parsable", *SIZE, f"--output={printed}", *options]
        said = bench.check("head", *command, f"scripts/slurm/{script}.sbatch", *arguments, environ=environ)
        self._number = said.split()[-1]

    def facts(self):
        """What SLURM says of it, by name: JobState, ExitCode, Restarts, ..."""
        said = self._bench.check("head", "scontrol", "show", "job", self._number)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def printed(self):
        return self._printed.read_text() if self._printed.exists() else ""

    def preempt(self):
        """Send what SLURM sends before the time limit."""
        self._bench.check("head", "scancel", "--batch", "--signal=USR1", self._number)

    def signal_steps(self):
        """Send USR1 to all that srun started."""
        self._bench.check("head", "scancel", "--signal=USR1", self._number)

    def requeue(self):
        """What SLURM does itself where a node has failed."""
        self._bench.check("head", "scontrol", "requeue", self._number)

    def cancel(self):
        self._bench.check("head", "scancel", self._number)

    def wait_until(self, is_so, *, within=600):
        until = time.monotonic() + within
        while not is_so():
            assert time.monotonic() < until, f"{self.facts()}\n{self.printed()[-3000:]}"
            time.sleep(0.2)

    def wait(self, *, within=600):
        """Return its facts once it has ended."""
        self.wait_until(lambda: self.facts()["JobState"] in ENDED, within=within)
        return self.facts()
