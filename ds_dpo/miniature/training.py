"""The state of one pre-training run, in one file from which it resumes."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ds_dpo.storage.replace import replacing

REPORT_EVERY = 200  # steps


class Training:
    """Modules, optimizer, EMA and random state of one pre-training run, in one file."""

    def __init__(
        self,
        file: Path,
        modules: list[nn.Module],
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        *,
        average_decay: float = 0.995,
    ):
        self.file, self.modules, self.optimizer, self.generator = file, modules, optimizer, generator
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.step, self.average_decay = 0, average_decay

    def resume(self) -> None:
        if not self.file.exists():
            return
        state = torch.load(self.file, weights_only=True)
        self.step, self.average = state["step"], state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        for module, saved in zip(self.modules, state["modules"], strict=True):
            module.load_state_dict(saved)

    def save(self) -> None:
        state = {
            "step": self.step,
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "modules": [module.state_dict() for module in self.modules],
        }
        with replacing(self.file, sync=False) as temporary:
            torch.save(state, temporary)

    def update(self, loss: Tensor, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.average_decay, self.step / (self.step + 9))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)

    def use_average(self) -> Callable[[], None]:
        """Put the averaged weights into the modules; returns a function that restores the trained ones."""
        trained = [parameter.detach().clone() for parameter in self.parameters]
        _copy_into(self.parameters, self.average)
        return lambda: _copy_into(self.parameters, trained)


@torch.no_grad()
def _copy_into(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
