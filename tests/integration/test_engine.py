"""Master weights start from the file's own values under every ZeRO stage, and their rounding is the reference."""

import os
from pathlib import Path

import forked
import pytest
import torch
from engine_worker import CASES

from ds_dpo.config.load import load_config
from ds_dpo.models.loading import file_weights

pytestmark = pytest.mark.launch
HERE = Path(__file__).parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    out = tmp_path_factory.mktemp("engines")
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(HERE.parent.parent),
    }
    done = forked.run([str(HERE / "engine_worker.py"), str(out)], env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_masters_are_the_files_values_and_the_module_their_rounding(engines, stage, precision):
    found = torch.load(engines / f"{stage}_{precision}.pt")
    expected = file_weights(load_config(["--config", "miniature"]).config.model)
    assert found["master"].keys() == expected.keys()
    for name, master in found["master"].items():
        assert master.dtype == torch.float32
        assert torch.equal(master, expected[name].float()), name
        assert torch.equal(found["module"][name], master.to(DTYPES[precision])), name
    # the miniature's file is fp16: bf16 cannot hold its values, so a master made from the module would differ
    if precision == "bf16":
        assert any((master.bfloat16() != master).any() for master in found["master"].values())
