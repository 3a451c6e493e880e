"""Tiny transformers of each family are trained alike by every ZeRO stage, residency of the reference, recomputation."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launching import curve, launch, spell, zero_stage
from tiny_flux1 import save_tiny_flux1
from tiny_flux2 import save_tiny_flux2
from tiny_sd3 import save_tiny_sd3
from transformer_runs import DRAWN, FAMILIES, GROUPS, STEPS, names, settings

pytestmark = pytest.mark.launch
SAVE = {"sd3": save_tiny_sd3, "flux1": save_tiny_flux1, "flux2_klein": save_tiny_flux2}
each_family = pytest.mark.parametrize("family", list(FAMILIES))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs left, all of one launch on 2 ranks."""
    out = tmp_path_factory.mktemp("transformers")
    runs = [
        own
        for family in FAMILIES
        for own in settings(family, str(SAVE[family](out / f"{family}_pipeline")), str(out)).values()
    ]
    launch(sorted(map(spell, runs), key=zero_stage), out, ranks=2)
    return out


@pytest.mark.parametrize(
    ("family", "group"), [(family, group) for family in FAMILIES for group in GROUPS if names(family, group)]
)
def test_curves_are_one(out: Path, family: str, group: str) -> None:
    first, *others = names(family, group)
    expected = curve(out / family / first)
    assert len(expected) == STEPS
    assert abs(expected[-1] - math.log(2)) > 1e-3, "the runs learn nothing"
    for name in others:
        assert curve(out / family / name) == pytest.approx(expected, abs=1e-4), name


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in FAMILIES for group in GROUPS for name in names(family, group)]
)
def test_the_first_difference_is_exactly_zero(out: Path, family: str, name: str) -> None:
    run = out / family / name
    assert curve(run)[0] == pytest.approx(math.log(2), abs=1e-7)
    assert curve(run, "chosen_difference")[0] == 0
    assert curve(run, "rejected_difference")[0] == 0


@each_family
def test_divided_weights_draw_images(out: Path, family: str) -> None:
    assert list((out / family / DRAWN / "samples").iterdir())


def test_a_start_says_the_scale_of_guidance(out: Path) -> None:
    log = (out / "flux1" / DRAWN / "log.txt").read_text()
    assert "guidance: policy and reference are given 2.5 for chosen and rejected alike (model.guidance)" in log
    assert "guidance:" not in (out / "sd3" / DRAWN / "log.txt").read_text()
