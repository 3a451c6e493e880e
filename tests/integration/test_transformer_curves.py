"""A transformer has one curve however its run is cut, fed or interrupted: ranks, ZeRO stages, micro-batches, caches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from invariance_cases import LARGEST_DEVIATION, STEPS, make_caches, residuals
from launching import curve, launch
from tiny_flux1 import save_tiny_flux1
from tiny_sd3 import save_tiny_sd3
from transformer_curves import BASELINE, CASES, FAMILIES, INTERRUPTED, LAUNCHES, TWIN, arguments, starts

from ds_dpo.zero_shards.reader import open_checkpoint

pytestmark = pytest.mark.launch
SAVE = {"sd3": save_tiny_sd3, "flux1": save_tiny_flux1}
OTHERS = [*(name for name in CASES if name != BASELINE), *INTERRUPTED]
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curves")
    for family in FAMILIES:
        SAVE[family](out / f"{family}_pipeline")
        make_caches(out / family, arguments(out, family, "unused", CASES[BASELINE]))
    for place, (ranks, *_) in enumerate(LAUNCHES):
        launch(starts(out, place), out, ranks=ranks)
    return out


@each_family
@pytest.mark.parametrize("name", OTHERS)
def test_a_curve_is_the_baselines(out: Path, family: str, name: str) -> None:
    expected = curve(out / family / BASELINE)
    assert len(expected) == len(curve(out / family / name)) == STEPS
    assert expected[0] == pytest.approx(math.log(2), abs=1e-7)
    assert max(expected) - min(expected) > 0.01, "a curve that does not move compares nothing"
    found = residuals(out / family / name, out / family / BASELINE)
    assert found.largest < LARGEST_DEVIATION, found


@each_family
def test_a_resume_on_the_same_ranks_is_equal_to_the_bit(out: Path, family: str) -> None:
    assert curve(out / family / "resumed") == curve(out / family / TWIN)
    resumed, whole = (
        open_checkpoint(out / family / name / "checkpoints" / f"step_{STEPS:08d}") for name in ("resumed", TWIN)
    )
    assert resumed.parameters.keys() == whole.parameters.keys()
    for parameter in whole.parameters:
        for quantity in ("fp32", "exp_avg", "exp_avg_sq"):
            assert torch.equal(resumed.read(parameter, quantity), whole.read(parameter, quantity)), parameter
