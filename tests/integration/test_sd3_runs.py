"""A tiny Stable Diffusion 3 is trained alike by every ZeRO stage, residency of the reference, and recomputation."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import curve, launch, spell, zero_stage
from sd3_runs import DRAWN, GROUPS, STEPS, settings
from tiny_sd3 import save_tiny_sd3

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs left, all of one launch on 2 ranks."""
    out = tmp_path_factory.mktemp("sd3")
    pipeline = save_tiny_sd3(out / "pipeline")
    starts = sorted((spell(own) for own in settings(str(pipeline), str(out)).values()), key=zero_stage)
    launch(starts, out, ranks=2)
    return out


@pytest.mark.parametrize("group", list(GROUPS))
def test_curves_are_one(out: Path, group: str) -> None:
    first, *others = GROUPS[group]
    expected = curve(out / first)
    assert len(expected) == STEPS
    assert abs(expected[-1] - math.log(2)) > 1e-3, "the runs learn nothing"
    for name in others:
        assert curve(out / name) == pytest.approx(expected, abs=1e-4), name


@pytest.mark.parametrize("name", [name for runs in GROUPS.values() for name in runs])
def test_the_first_difference_is_exactly_zero(out: Path, name: str) -> None:
    assert curve(out / name)[0] == pytest.approx(math.log(2), abs=1e-7)
    assert curve(out / name, "chosen_difference")[0] == 0
    assert curve(out / name, "rejected_difference")[0] == 0


def test_divided_weights_draw_images(out: Path) -> None:
    assert list((out / DRAWN / "samples").iterdir())
