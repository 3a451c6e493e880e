"""A copied state is equal, is its own, keeps what shares memory together, and its memory is used again."""

import io
from collections import OrderedDict

import torch
from torch import nn

from ds_dpo.storage.state_files import HostCopies, StateFile, num_bytes


def file(state: object, name: str = "state.pt") -> StateFile:
    return StateFile(name=name, state=state, write=torch.save)


class Scaler:
    """Plain state of another library, as DeepSpeed's loss scaler."""

    def __init__(self) -> None:
        self.scale = 8.0


def module_like() -> tuple[torch.Tensor, OrderedDict[str, torch.Tensor]]:
    """Parameters that are views into one flat piece of memory, as ZeRO 1 and 2 keep them: 10 floats, 2 of padding."""
    flat = torch.arange(10.0)
    state = OrderedDict(weight=flat[:6].view(2, 3), turned=flat[:6].view(2, 3).t(), bias=flat[6:8])
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    return flat, state


def test_training_does_not_reach_a_copy() -> None:
    flat, module = module_like()
    scaler, rates = Scaler(), [1.0, 2.0]
    state = {"module": module, "scaler": scaler, "rates": rates, "groups": ([nn.Parameter(flat[:2])], "adam")}
    (copied,) = HostCopies().copy([file(state)])
    flat.zero_()
    scaler.scale = 4.0
    rates.append(3.0)
    found = copied.state
    assert found["module"]["weight"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert found["module"]["turned"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert found["module"]["bias"].tolist() == [6.0, 7.0]
    assert found["module"]._metadata == {"": {"version": 1}}
    assert (found["scaler"].scale, found["rates"]) == (8.0, [1.0, 2.0])
    (parameter,), name = found["groups"]
    assert (type(parameter), parameter.requires_grad, name) == (nn.Parameter, True, "adam")
    assert type(found["module"]) is OrderedDict


def test_a_file_of_a_copy_is_the_same_to_the_byte() -> None:
    _, module = module_like()
    state = {
        "module": module,
        "steps": torch.tensor(3),
        "low": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0),
    }
    written = []
    for each in (file(state), *HostCopies().copy([file(state)])):
        buffer = io.BytesIO()
        torch.save(each.state, buffer)
        written.append(buffer.getvalue())
    assert written[0] == written[1]


def test_memory_that_is_shared_counts_and_is_copied_once() -> None:
    flat, module = module_like()
    files = [file(module, "a.pt"), file({"flat": flat, "other": torch.zeros(3)}, "b.pt")]
    assert num_bytes(files) == 4 * (10 + 3)
    first, second = HostCopies().copy(files)
    second.state["flat"][0] = 9.0
    assert first.state["weight"][0, 0] == 9.0


def test_memory_is_used_again_only_after_it_was_given_back() -> None:
    copies = HostCopies()
    files = [file({"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(2)})]
    assert copies.bytes_to_allocate(files) == 40
    (first,) = copies.copy(files)
    assert copies.bytes_to_allocate(files) == 40, "it is in use"
    copies.release()
    assert copies.bytes_to_allocate(files) == 0
    assert copies.bytes_to_allocate([file(torch.zeros(4), "x"), file(torch.zeros(3), "y")]) == 12
    (second,) = copies.copy(files)
    places = [{tensor.data_ptr() for tensor in each.state.values()} for each in (first, second)]
    assert places[0] == places[1]
    assert len(places[0]) == 3
