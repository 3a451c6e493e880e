"""The shipped hostfiles, as DeepSpeed's own launcher reads them."""

import pytest
from repository import ROOT

HOSTFILES = ROOT / "hostfiles"


@pytest.mark.parametrize(("name", "hosts", "slots"), [("a100x16", 2, 8), ("h100x64", 8, 8), ("localhost", 1, 2)])
def test_deepspeed_reads_hosts_and_slots(name: str, hosts: int, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher.runner import fetch_hostfile

    found = fetch_hostfile(str(HOSTFILES / name))
    assert len(found) == hosts
    assert set(found.values()) == {slots}
