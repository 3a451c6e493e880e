"""The two-host bench for the tests of this folder, one for all of them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from two_hosts import Bench, CannotHaveBenchError


@pytest.fixture(scope="session")
def bench():
    """Hosts n1 and n2, and a SLURM over both; where a machine cannot have them, tests are skipped with the reason."""
    bench = Bench()
    try:
        bench.start(DSC_CRED_EXPIRE=5)
        yield bench
    except CannotHaveBenchError as reason:
        pytest.skip(str(reason))
    finally:
        bench.stop()
