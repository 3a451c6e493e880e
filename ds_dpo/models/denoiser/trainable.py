"""Choose the parameters of a denoiser that are trained: all, or those that patterns match."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from ds_dpo.errors import ConfigError


def choose_trained(denoiser: nn.Module, *, train: Sequence[str], freeze: Sequence[str]) -> None:
    """Set requires_grad of parameters that match a pattern of train (all if it is empty) and none of freeze.

    Patterns match whole names, with * and ? and [..] as in file names. Raises ConfigError for a pattern that matches no
    parameter, and if nothing is left to train.
    """
    names = [name for name, _ in denoiser.named_parameters()]
    chosen = set(_matching(train, names, field="model.train")) if train else set(names)
    chosen -= set(_matching(freeze, names, field="model.freeze"))
    if not chosen:
        raise ConfigError(
            f"model.freeze {' '.join(freeze)} leaves nothing to train"
            + (f" of the parameters in model.train {' '.join(train)}" if train else "")
        )
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(name in chosen)


def describe_trained(denoiser: nn.Module) -> str:
    """Return a line with the numbers of trained and all parameters, plain or partitioned by ZeRO 3."""
    parameters = list(denoiser.parameters())
    numels = [(int(getattr(each, "ds_numel", each.numel())), each.requires_grad) for each in parameters]
    trained, total = sum(numel for numel, is_trained in numels if is_trained), sum(numel for numel, _ in numels)
    return f"trains {_count(trained)} of {_count(total)} parameters"


def _matching(patterns: Iterable[str], names: Sequence[str], *, field: str) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise ConfigError(f"{field} {pattern} matches no parameter of this model; {_near(pattern, names)}")
        found += matching
    return found


def _near(pattern: str, names: Sequence[str]) -> str:
    plain = pattern.strip("*.")
    inside = [name for name in names if plain and plain in name]
    near = inside[:2] or get_close_matches(plain, names, n=2, cutoff=0.5)
    if not near:  # a part of a name is mistyped, such as atn2 for attn2
        words = sorted({word for name in names for word in name.split(".") if not word.isdigit()})
        close = [word for part in plain.split(".") for word in get_close_matches(part, words, n=1, cutoff=0.6)]
        near = [name for name in names if close and all(word in name.split(".") for word in close)][:2] or [names[0]]
    return f"examples of names are {' and '.join(near)}; * matches any part of a name"


def _count(number: int) -> str:
    return f"{number / 1e6:.3g} M" if number < 1e9 else f"{number / 1e6:.0f} M"
