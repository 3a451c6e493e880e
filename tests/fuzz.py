"""Change one byte of a file, or cut it, and read it: every end is a value or an error of this project, soon and small.

    python tests/fuzz.py                          300 changed bytes and 100 cuts of each kind of file, about 20 minutes
    python tests/fuzz.py --kinds manifest tar     some kinds
    python tests/fuzz.py --flips 5 --cuts 5       fewer cases, as tests/unit/test_fuzz.py runs them

Each kind is read in a process of its own. A case fails if anything but a DsDpoError is raised, if it takes more than
10 seconds of processor time, or if memory grows by more than 1 GB. The seed is fixed: a failure comes again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from fuzz_kinds import KINDS, Prepared  # noqa: E402 (found in the folders above)

from ds_dpo.errors import DsDpoError  # noqa: E402

SEED = 17
MAX_SECONDS, MAX_GROWTH_BYTES, HARD_LIMIT_BYTES = 10, 10**9, 3 * 10**9
SECONDS_TO_START = 60
MESSAGE_CHARACTERS = 2000
HEAD_BYTES = 2000  # half of the changes are in a file's first or last so many bytes, where its structure is


@dataclasses.dataclass
class Result:
    """What became of a kind's cases. failures: a line for each, with what brings it back."""

    kind: str
    read: int = 0
    refused: int = 0
    slowest_seconds: float = 0.0
    growth_bytes: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)


class TooSlow(BaseException):
    """Not an Exception, so that no reader takes it for a damaged file."""


def damages(content: bytes, *, seed: str, flips: int, cuts: int) -> Iterator[tuple[str, bytes]]:
    """Yield descriptions and changed contents: flips with one other byte each, then cuts."""
    draw = random.Random(seed)
    for _ in range(flips):
        near = draw.choice(["anywhere", "head", "tail"])
        low = max(0, len(content) - HEAD_BYTES) if near == "tail" else 0
        high = min(len(content), HEAD_BYTES) if near == "head" else len(content)
        place = draw.randrange(low, high)
        value = content[place] ^ draw.randrange(1, 256)
        yield f"byte {place} is {value}", content[:place] + bytes([value]) + content[place + 1 :]
    for _ in range(cuts):
        length = draw.randrange(len(content))
        yield f"cut to {length} bytes", content[:length]


@contextmanager
def _time_limit() -> Iterator[None]:
    """Let a timer of processor time raise TooSlow in the body."""

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, before)


@_time_limit()
def read_kind(
    name: str, *, flips: int, cuts: int, seed: int, seconds: float, begin: Callable[[str], None] = str
) -> Result:
    """Prepare a kind's files, damage each in turn, and read them. begin: gets the words of each case before it."""
    result = Result(name)
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        prepared = KINDS[name](Path(folder))
        prepared.read()  # undamaged; imports are not what is measured
        before = _peak_bytes()
        for path in prepared.paths:
            content = path.read_bytes()
            share = len(prepared.paths)
            cases = damages(
                content, seed=f"{seed} {name} {path.name}", flips=-(-flips // share), cuts=-(-cuts // share)
            )
            for words, changed in cases:
                if time.monotonic() > deadline:
                    result.failures.append(f"{name}: not all cases within {seconds:g} s")
                    return result
                path.write_bytes(changed)
                case = f"{name}, {path.relative_to(folder)}: {words}"
                begin(case)
                _read_case(prepared, case, result)
            path.write_bytes(content)
        result.growth_bytes = _peak_bytes() - before
    return result


def _read_case(prepared: Prepared, case: str, result: Result) -> None:
    peak, start = _peak_bytes(), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        prepared.read()
        result.read += 1
    except DsDpoError as error:
        result.refused += 1
        _, *more = str(error).split("\n")
        # a list of what is wrong has a line for each, indented
        if len(str(error)) > MESSAGE_CHARACTERS or not all(line.startswith("  ") for line in more):
            result.failures.append(f"{case}: a message of {len(str(error))} characters in {len(more) + 1} lines")
    except TooSlow:
        result.failures.append(f"{case}: more than {MAX_SECONDS} s")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "ds_dpo" in frame.filename] or list(where)
        frame = ours[-1]
        result.failures.append(
            f"{case}: {type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}: {str(error)[:100]}"
        )
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    result.slowest_seconds = max(result.slowest_seconds, time.process_time() - start)
    if _peak_bytes() - peak > MAX_GROWTH_BYTES:
        result.failures.append(f"{case}: {(_peak_bytes() - peak) / 1e9:.1f} GB")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_child(sender: Connection, name: str, options: dict[str, Any]) -> None:
    # an allocation beyond this fails in the case that asks for it, instead of taking the machine's memory
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + HARD_LIMIT_BYTES,) * 2)
    sender.send(read_kind(name, begin=sender.send, **options))


def _data_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def fuzz(
    names: list[str], *, flips: int, cuts: int, seed: int, seconds: float, say: Callable[[str], None]
) -> list[str]:
    """Read all cases of these kinds, each in a process of its own, say a line for each, and return the failures.

    seconds: of each kind, after which its process is ended.
    """
    failures: list[str] = []
    for name in names:
        result = _result_of_child(name, {"flips": flips, "cuts": cuts, "seed": seed, "seconds": seconds})
        say(
            f"{name:24} {result.read:4} read, {result.refused:4} refused, {len(result.failures):3} failed, slowest "
            f"{result.slowest_seconds:.2f} s, {result.growth_bytes / 1e6:.0f} MB more"
        )
        for failure in result.failures:
            say(f"  {failure}")
        failures += result.failures
    return failures


def _result_of_child(name: str, options: dict[str, Any]) -> Result:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(sender, name, options))
    child.start()
    sender.close()
    result, begun = Result(name), f"{name}, before the first case"
    deadline = time.monotonic() + options["seconds"] + SECONDS_TO_START
    try:
        while receiver.poll(max(0, deadline - time.monotonic())):
            received = receiver.recv()
            if isinstance(received, Result):
                result = received
                break
            begun = received
        else:
            result.failures.append(f"{begun}: no end")
            child.kill()
    except EOFError:
        child.join()
        result.failures.append(f"{begun}: the process ended with status {child.exitcode}")
    child.join()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--flips", type=int, default=300, help="changed bytes of each kind (default: 300)")
    parser.add_argument("--cuts", type=int, default=100, help="cuts of each kind (default: 100)")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--seconds", type=float, default=900, help="time limit of each kind (default: 900)")
    asked = parser.parse_args()
    failures = fuzz(asked.kinds, flips=asked.flips, cuts=asked.cuts, seed=asked.seed, seconds=asked.seconds, say=print)
    print(json.dumps({"kinds": len(asked.kinds), "flips": asked.flips, "cuts": asked.cuts, "failed": len(failures)}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
