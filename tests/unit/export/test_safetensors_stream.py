"""Files written tensor by tensor are what the safetensors library reads."""

import torch
from safetensors import safe_open

from ds_dpo.export.safetensors_stream import TensorSpec, split_into_files, write_safetensors


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
