"""Checks before an export is called done, against files and distances made by hand."""

import math

import pytest
import torch
from safetensors.torch import save_file
from zero_checkpoint import save_zero2

from ds_dpo.errors import CheckpointError, ModelError
from ds_dpo.export.tensors.safetensors_stream import TensorSpec
from ds_dpo.export.tensors.verification import measure_distance, verify_files
from ds_dpo.zero_shards.reader import open_checkpoint

SPECS = [TensorSpec("a", (2, 3), torch.float16), TensorSpec("b", (4,), torch.float16)]
GOOD = {"a": torch.zeros(2, 3).half(), "b": torch.zeros(4).half()}


def test_written_files_are_what_was_meant(tmp_path):
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file({"a": GOOD["a"]}, one)
    save_file({"b": GOOD["b"], "other": torch.zeros(1, dtype=torch.int64)}, two)
    verify_files([one, two], SPECS, others={"other"})
    with pytest.raises(CheckpointError, match=r"'other' was written as .*, not None"):
        verify_files([one, two], SPECS)
    with pytest.raises(CheckpointError, match="'gone' of the base file was lost"):
        verify_files([one, two], SPECS, others={"other", "gone"})
    with pytest.raises(CheckpointError, match="'a' was written twice"):
        verify_files([one, one], SPECS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a": torch.zeros(2, 3)}, r"'a' was written as \('F32', \(2, 3\)\), not \('F16', \(2, 3\)\)"),
        ({"b": torch.zeros(2, 2).half()}, r"'b' was written as \('F16', \(2, 2\)\)"),
        ({"b": None}, "'b' was written as None"),
    ],
)
def test_what_differs_is_named(tmp_path, change, said):
    path = tmp_path / "x.safetensors"
    save_file({name: tensor for name, tensor in {**GOOD, **change}.items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=said):
        verify_files([path], SPECS)


def masters(tmp_path, weights):
    return open_checkpoint(save_zero2(tmp_path / "tag", weights))


def test_distance_by_hand(tmp_path):
    base = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 12.0])}
    found = measure_distance(masters(tmp_path, {"a": torch.tensor([3.0, 4.5]), "b": base["b"]}), base)
    assert found.squared == {"a": 0.25, "b": 0}
    assert found.relative == pytest.approx(0.5 / 13)  # |(3, 4, 0, 12)| = 13
    assert found.moved == {"a"}
    assert "0.03846 of its norm; 1 of 2 tensors moved, most a by 0.1" in found.describe()


@pytest.mark.parametrize("saved", [torch.float16, torch.float32])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_a_run_that_trained_nothing(tmp_path, saved, held):
    base = {"a": torch.linspace(0.1, 0.9, 7).to(saved), "b": torch.ones(3).to(saved)}
    start = {name: weight.to(held).float().clone() for name, weight in base.items()}
    found = measure_distance(masters(tmp_path / "same", start), base)
    assert found.moved == set()
    assert f"trained nothing: none of 2 tensors differs from the base's by more than the rounding of {saved}" in (
        found.describe()
    )
    # one element, one step of the base's dtype
    start["a"][3] = torch.nextafter(base["a"][3], base["a"][3] + 1).float()
    assert measure_distance(masters(tmp_path / "moved", start), base).moved == {"a"}


def test_less_than_the_rounding_of_the_base_is_nothing(tmp_path):
    base = {"a": torch.tensor([1.0]).half()}
    step = 2.0**-10  # of fp16 above 1
    nothing = masters(tmp_path / "less", {"a": torch.tensor([1 + 0.4 * step])})
    something = masters(tmp_path / "more", {"a": torch.tensor([1 + 0.6 * step])})
    assert measure_distance(nothing, base).moved == set()
    assert measure_distance(something, base).moved == {"a"}
    assert math.isclose(measure_distance(something, base).relative, 0.6 * step, rel_tol=1e-3)


def test_another_base_is_refused(tmp_path):
    found = masters(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(ModelError, match=r"'b' is absent in the base and \(2,\) in the checkpoint"):
        measure_distance(found, {"a": torch.ones(2)})
    with pytest.raises(ModelError, match=r"'a' is \(3,\) in the base"):
        measure_distance(found, {"a": torch.ones(3), "b": torch.ones(2)})
