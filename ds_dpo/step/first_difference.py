"""Find the first module that computes something else in one model than in another, and say what sets the two apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_dpo.models.checksum import content_sum
from ds_dpo.models.denoiser.adapters import is_of_adapter
from ds_dpo.step.differences_in_words import ModuleLook, TensorLook, causes, certain_causes

_INSIDE_AN_ADAPTER = ".base_layer"  # peft's name for the layer that it wraps


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of two models that should predict alike. module: a plain one, or an engine. predict: makes a forward pass."""

    module: nn.Module
    predict: Callable[[], object]


@dataclass(frozen=True, order=True)
class _Place:
    """The call with this number, from 0, of the module with this name in one forward pass."""

    name: str
    number: int


@dataclass(frozen=True)
class _Call:
    """Sums over the contents of what a call of a module reads and returns, in order."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def first_difference(policy: Side, reference: Side) -> str | None:
    """Say which module is the first to compute something else in the policy, and how its two calls differ.

    Returns None if no module differs. It makes two forward passes of each side, whatever it finds, so that ranks which
    share weights do not wait for each other. It keeps sums of what modules read and return, and the outputs of two
    calls, never all activations.
    """
    calls, other_calls = _calls(policy), _calls(reference)
    first, around = _first(calls, other_calls)
    places = [place for place in (first, around) if place is not None]
    looks = _looks(policy, places)
    other_looks = _looks(reference, [_counterpart(place, other_calls) for place in places])
    pairs = dict(zip(places, zip(looks, other_looks, strict=True), strict=True))
    if first is None:
        return None
    if around is None or around == first or certain_causes(*pairs[first]):
        reads = "the same values" if around == first else "other values"
        return _sentence(first, *pairs[first], reads=reads)
    inside = f"inside it, {_named(first, pairs[first][0])} is the first to read other values"
    return f"{_sentence(around, *pairs[around], reads='the same values')}; {inside}"


def _sentence(place: _Place, own: ModuleLook, other: ModuleLook, *, reads: str) -> str:
    return (
        f"the first module that differs is {_named(place, own)}: it reads {reads}, and its outputs differ by up to "
        f"{_largest_difference(own, other):.3g}; {'; '.join(causes(own, other))}"
    )


def _named(place: _Place, look: ModuleLook) -> str:
    name = place.name.replace(_INSIDE_AN_ADAPTER, "")
    return f"{name} ({look.kind})" if name else f"the whole {look.kind}"


def _first(calls: Mapping[_Place, _Call], others: Mapping[_Place, _Call]) -> tuple[_Place | None, _Place | None]:
    """Return the first call to end with other outputs, and the first of those that read the same."""
    differing = [
        place
        for place, call in calls.items()
        if (other := _counterpart(place, others)) in others and others[other].outputs != call.outputs
    ]
    reading_alike = (place for place in differing if others[_counterpart(place, others)].inputs == calls[place].inputs)
    return next(iter(differing), None), next(reading_alike, None)


def _counterpart(place: _Place, others: Mapping[_Place, _Call]) -> _Place:
    """Return the place of the same call in the other model, in which a layer may be without the adapter around it."""
    return place if place in others else _Place(place.name.replace(_INSIDE_AN_ADAPTER, ""), place.number)


def _calls(side: Side) -> dict[_Place, _Call]:
    """Make a forward pass and return the calls of all modules in the order in which they end."""
    calls: dict[_Place, _Call] = {}
    begun: dict[_Place, tuple[int, ...]] = {}

    def begin(place: _Place, module: nn.Module, inputs: list[tuple[str, Tensor]]) -> None:
        begun[place] = tuple(_value_sum(tensor) for _, tensor in inputs)

    def end(place: _Place, outputs: list[tuple[str, Tensor]]) -> None:
        calls[place] = _Call(begun.pop(place), tuple(_value_sum(tensor) for _, tensor in outputs))

    with _hooks(side.module, begin, end):
        side.predict()
    return calls


def _looks(side: Side, places: list[_Place]) -> list[ModuleLook]:
    """Make a forward pass and return what these calls in it read, compute with and return."""
    found: dict[_Place, ModuleLook] = {}

    def begin(place: _Place, module: nn.Module, inputs: list[tuple[str, Tensor]]) -> None:
        if place in places:
            found[place] = _look_at(module, inputs)

    def end(place: _Place, outputs: list[tuple[str, Tensor]]) -> None:
        if place in places:
            found[place].outputs.extend(tensor.detach().cpu() for _, tensor in outputs)

    with _hooks(side.module, begin, end):
        side.predict()
    return [found[place] for place in places]


def _look_at(module: nn.Module, inputs: list[tuple[str, Tensor]]) -> ModuleLook:
    tensors = {f"input {name}": _tensor_look(tensor) for name, tensor in inputs}
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    tensors |= {name: _tensor_look(tensor, content=_value_sum(tensor)) for name, tensor in own if tensor.numel()}
    processor = getattr(module, "processor", None)
    return ModuleLook(
        kind=type(getattr(module, "base_layer", module)).__name__,
        tensors=tensors,
        processor=None if processor is None else type(processor).__name__,
        has_active_adapter=_has_active_adapter(module),
    )


def _has_active_adapter(module: nn.Module) -> bool:
    has_one = any(is_of_adapter(name) for name, _ in module.named_children())
    return has_one and not getattr(module, "disable_adapters", False)


def _tensor_look(tensor: Tensor, *, content: int | None = None) -> TensorLook:
    # no CPU kernel asks for more than a cache line; cuBLASLt looks at up to 256 bytes
    most = 256 if tensor.device.type == "cuda" else 64
    address = tensor.data_ptr()
    return TensorLook(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        strides=tensor.stride(),
        alignment=min(address & -address, most) if address else most,
        content=content,
    )


@contextmanager
def _hooks(
    module: nn.Module,
    begin: Callable[[_Place, nn.Module, list[tuple[str, Tensor]]], None],
    end: Callable[[_Place, list[tuple[str, Tensor]]], None],
) -> Iterator[None]:
    """Call `begin` and `end` around each call of each module while it has its weights, under any ZeRO stage."""
    counts: dict[str, int] = {}
    open_calls: list[_Place] = []
    handles = []

    def before(name: str, part: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        place = _Place(name, counts.get(name, 0))
        counts[name] = place.number + 1
        open_calls.append(place)
        begin(place, part, list(_tensors({**dict(enumerate(positional)), **named})))

    def after(name: str, outputs: Any) -> None:
        end(open_calls.pop(), list(_tensors(outputs)))

    inner = getattr(module, "module", module)  # of an engine
    for name, part in inner.named_modules():
        # the last hooks, so that they see what others make of inputs and outputs, and the weights that ZeRO-3 gathers
        handles += [
            part.register_forward_pre_hook(
                lambda part, positional, named, name=name: before(name, part, positional, named), with_kwargs=True
            ),
            part.register_forward_hook(lambda part, inputs, outputs, name=name: after(name, outputs)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested containers with their places in them."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _tensors(part, f"{name}.{number}" if name else str(number))


def _value_sum(tensor: Tensor) -> int:
    """Return a sum over values, whatever the layout and the 16-bit type that holds them; -0 counts as 0."""
    values = tensor.detach()
    if values.is_floating_point():
        values = values.to(torch.promote_types(values.dtype, torch.float32)) + 0
    return content_sum(values)


def _largest_difference(own: ModuleLook, other: ModuleLook) -> float:
    pairs = zip(own.outputs, other.outputs, strict=False)
    return max((float((one.double() - two.double()).abs().max()) for one, two in pairs if one.numel()), default=0.0)
