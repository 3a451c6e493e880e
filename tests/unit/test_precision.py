"""Unit tests of the precisions and their dtypes."""

import subprocess
import sys

import pytest
import torch

from ds_dpo.precision import TORCH_NAMES, precision_of_dtype, torch_dtype

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize(("precision", "dtype"), DTYPES.items())
def test_a_precision_and_its_dtype_name_each_other(precision: str, dtype: torch.dtype) -> None:
    assert torch_dtype(precision) is dtype
    assert precision_of_dtype(dtype) == precision


def test_no_other_name_is_a_precision() -> None:
    assert TORCH_NAMES.keys() == DTYPES.keys()
    with pytest.raises(KeyError, match="float16"):
        torch_dtype("float16")
    with pytest.raises(KeyError, match="float64"):
        precision_of_dtype(torch.float64)


def test_the_names_of_precisions_need_no_torch() -> None:
    program = "import sys; import ds_dpo.precision; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
