"""The memory figures of README.md and docs/memory.md are those that benchmarks/model_states.py computes."""

import re
import sys

import pytest
from repository import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from model_states import lora_bytes, num_parameters, policy_bytes, table

FAMILY_OF_MODEL = {"SDXL": "sdxl", "SD 1.5": "sd15"}
WITHOUT_REFERENCE = ("sdxl_mapo",)


def readme_rows() -> list[tuple[int, str, str, int, float]]:
    """Return GPUs, model, preset, ZeRO stage and GB of each row of README's table that has GB."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pattern = r"^\| (\d+) \| (SDXL|SD 1\.5)[^|]* \| `(\w+)`[^|]* \| `zero(\d)_bf16` \| ([\d.]+) \|$"
    rows = re.findall(pattern, text, flags=re.MULTILINE)
    return [(int(gpus), model, preset, int(stage), float(gb)) for gpus, model, preset, stage, gb in rows]


def test_zero_divides_the_16_bytes_of_a_parameter_that_its_stage_names() -> None:
    assert policy_bytes(100, stage=1, gpus=4) == 100 * (2 + 4 + 2 + 12 / 4)
    assert policy_bytes(100, stage=2, gpus=4) == 100 * (2 + 16 / 4)
    assert policy_bytes(100, stage=3, gpus=4) == 100 * 18 / 4
    assert num_parameters("sdxl") == 2_567_463_684  # diffusers' own count of stabilityai/stable-diffusion-xl-base-1.0


def test_the_memory_page_holds_what_the_script_prints() -> None:
    assert "\n".join(table()) in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", readme_rows(), ids=str)
def test_the_readme_has_the_figures_of_the_memory_page(row: tuple[int, str, str, int, float]) -> None:
    gpus, model, preset, stage, gigabytes = row
    family = FAMILY_OF_MODEL[model]
    if preset == "sdxl_pickapic_lora":
        computed = lora_bytes(family, rank=8)
    else:
        reference = 0 if preset in WITHOUT_REFERENCE else 2 * num_parameters(family)
        computed = policy_bytes(num_parameters(family), stage=stage, gpus=gpus) + reference
    assert gigabytes == round(computed / 1e9, 1)


def test_the_readme_has_a_table_to_check() -> None:
    assert len(readme_rows()) == 10
