"""Files written tensor by tensor are what the safetensors library reads."""

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ds_dpo.export.tensors.safetensors_stream import TensorSpec, split_into_files, stream_safetensors, write_safetensors


def test_library_reads_what_was_streamed(tmp_path):
    tensors = {
        "b": torch.arange(6.0).view(2, 3),
        "a": torch.tensor([1.5, -2.0]).bfloat16(),
        "scalar": torch.tensor(7.0).half(),
    }
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    path = tmp_path / "x.safetensors"
    write_safetensors(path, specs, lambda spec: tensors[spec.name], metadata={"modelspec.title": 'a "b" é'})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "modelspec.title": 'a "b" é'}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


def test_files_hold_at_most_so_many_bytes():
    specs = [TensorSpec(name, (size,), torch.float16) for name, size in [("a", 3), ("b", 2), ("c", 9), ("d", 1)]]
    files = split_into_files(specs, max_bytes=10)
    assert [[spec.name for spec in file] for file in files] == [["a", "b"], ["c"], ["d"]]


def test_tensors_of_any_dtype_and_place_are_filled(tmp_path):
    # an odd number of 16-bit elements puts the next tensor at a place that fp32 cannot be laid over
    tensors = {
        f"{index}": torch.full((7 * index + 1,), float(index)).to(dtype)
        for index, dtype in enumerate([torch.float16, torch.float32, torch.bfloat16] * 20)
    }
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    filled = []

    def fill(spec, place):
        assert (tuple(place.shape), place.dtype) == (spec.shape, spec.dtype)
        place.copy_(tensors[spec.name])
        filled.append(spec.name)

    stream_safetensors(tmp_path / "x.safetensors", specs, fill, buffer_bytes=1)
    assert filled == list(tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_number_of_threads_is_as_before(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        specs = [TensorSpec("a", (1,), torch.float32)]
        stream_safetensors(tmp_path / "x", specs, lambda spec, place: seen.append(torch.get_num_threads()))
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)
