"""The policy inside a DeepSpeed engine: updates, master weights, and DeepSpeed's own checkpoint calls."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_dpo.config.optimization import OptimizerConfig, ScheduleConfig
from ds_dpo.distributed.collectives import is_main, world_size
from ds_dpo.engine.compiler import require_compiler
from ds_dpo.engine.device import give_groups_the_timeout
from ds_dpo.engine.elastic import read_into
from ds_dpo.engine.follower import Follower, weight_pieces
from ds_dpo.engine.layout import engine_layout, layout_digest, master_groups
from ds_dpo.engine.learning_rate import build_schedule
from ds_dpo.engine.moving_average import MovingAverage
from ds_dpo.engine.noting_engine import NotingCheckpointEngine
from ds_dpo.engine.optimizers import build_optimizer, require_countable
from ds_dpo.engine.other_weights import set_weights
from ds_dpo.engine.partitioning import is_divided, use_lean_linear
from ds_dpo.errors import CheckpointError, ConfigError
from ds_dpo.process.quiet import quiet_output
from ds_dpo.storage.state_files import StateFile

with quiet_output():  # when imported, DeepSpeed prints what it finds of compilers and drivers
    import deepspeed

# DeepSpeed's throughput timer would wait for the device twice in each micro-batch; the run measures whole steps
UNTIMED = {"timers": {"throughput": {"enabled": False}}}


class Engine:
    """A thin layer over deepspeed.DeepSpeedEngine, with what the trainer needs."""

    def __init__(self, raw: Any, *, saves_frozen_weights: bool = True) -> None:
        """saves_frozen_weights: whether checkpoints also hold the weights that are not trained."""
        self._raw = raw
        self._notes = raw.checkpoint_engine = NotingCheckpointEngine(raw.checkpoint_engine)
        # DeepSpeed's save would still copy a script beside the checkpoints
        raw._copy_recovery_script = lambda save_path: None
        self._saves_frozen_weights = saves_frozen_weights
        self._averages: dict[str, MovingAverage] = {}
        self._let_scale_stay_least()

    @property
    def policy(self) -> nn.Module:
        """The callable that predicts. Forward passes go through it, so that ZeRO's hooks run."""
        return self._raw

    @property
    def module(self) -> nn.Module:
        """The wrapped denoiser itself, for its configuration and for sampling."""
        return self._raw.module

    @property
    def device(self) -> torch.device:
        return self._raw.device

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return float(self._raw.optimizer.param_groups[0]["lr"])

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply the learning rate and its schedule from the next update on. Checkpoints save the change."""
        schedule = self._raw.lr_scheduler
        schedule.base_lrs = [factor * rate for rate in schedule.base_lrs]
        for group in self._raw.optimizer.param_groups:
            group["lr"] *= factor

    @property
    def gradient_norm(self) -> float | None:
        """The 2-norm of all gradients of the last update before clipping; None if there is none."""
        norm = self._raw.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def skipped_steps(self) -> int:
        """Number of updates skipped since the start because a loss or a gradient was not finite."""
        return int(self._raw.skipped_steps)

    @property
    def loss_scale(self) -> float | None:
        """The fp16 loss scale; None in other precisions."""
        if not self._raw.fp16_enabled():
            return None
        return float(self._raw.optimizer.loss_scale)

    @property
    def least_loss_scale(self) -> float | None:
        """The smallest value to which overflows lower the loss scale; None if it is fixed, and without fp16."""
        scaler: Any = getattr(self._raw.optimizer, "loss_scaler", None)
        return float(scaler.min_scale) if getattr(scaler, "dynamic", False) else None

    def _let_scale_stay_least(self) -> None:
        """Keep DeepSpeed from ending the run by itself at the first overflow of the smallest loss scale."""
        if self.least_loss_scale is not None:
            self._raw.optimizer.loss_scaler.raise_error_at_min_scale = False

    def backward_and_step(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient; after the last micro-batch of a step DeepSpeed updates the weights.

        loss: scalar, the mean over the micro-batch; DeepSpeed divides by the number of accumulations. If the loss or a
        gradient is not finite on any rank, all ranks skip the update: weights, moments, rate and averages stay.
        """
        # DeepSpeed checks only the norm of all ranks' gradients, but a loss can be inf with a finite gradient. The
        # factor is exactly 1, or NaN, which reaches that norm without a wait for the device or another rank.
        self._raw.backward(loss * (1 + 0 * loss.detach()))
        updates_before = self._raw.global_steps - self._raw.skipped_steps
        self._raw.step()
        if self._averages and self._raw.global_steps - self._raw.skipped_steps > updates_before:
            masters = self.flat_master_groups()
            for average in self._averages.values():
                average.update(masters)

    def keep_average(self, *, decay: float) -> None:
        """Keep a moving average of the master weights from now on; it becomes part of checkpoints."""
        self._averages["ema"] = MovingAverage(self.flat_master_groups(), decay=decay)

    def follow(self, module: nn.Module, *, decay: float) -> Follower:
        """Keep a moving average that starts from a frozen module's weights, and return what writes it into the module.

        The average is updated with the masters from now on, and becomes part of checkpoints. Every rank must call this.
        """
        average = MovingAverage(self.flat_master_groups(), decay=decay, kind="reference")
        self._averages[average.kind] = average
        return Follower(module, average=average, layout=engine_layout(self._raw), device=self.device)

    def flat_master_groups(self) -> list[Tensor]:
        """Return this rank's fp32 master weights as DeepSpeed holds and saves them: 1-D, one per group."""
        optimizer = self._raw.optimizer
        groups = master_groups(optimizer)
        # ZeRO 1 and 2 save the last rank's part without the padding at its end
        unpadded = getattr(optimizer, "_get_groups_without_padding", None)
        return groups if unpadded is None else list(unpadded(groups))

    @torch.no_grad()
    def set_master_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set the fp32 master weights to the file's own values, instead of their 16-bit rounding.

        DeepSpeed copies the masters from the already rounded module. This writes only this rank's part of each tensor,
        one tensor at a time, so that a mapping that reads lazily from files needs no memory.
        """
        layout = engine_layout(self._raw)
        for part in layout.parts:
            part.of(layout.masters).copy_(weights[part.name].flatten()[part.start : part.start + part.numel])

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set the master weights and what follows from them, and the frozen weights that are named.

        Every rank must call this. weights: at least the trained ones, of the engine's shapes, each read once. Raises on
        all ranks what reading them raises; the engine must not be used after that.
        """
        set_weights(self._raw, weights)

    @torch.no_grad()
    def copy_weights_to(self, module: nn.Module) -> None:
        """Copy the policy's working weights, not the masters, into a plain module; every rank must call this.

        Under ZeRO-3 they are gathered piece by piece, so that the policy is never whole on a device.
        """
        for piece in weight_pieces(self.module):
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in piece]):  # a no-op below stage 3
                for name, parameter in piece:
                    module.get_parameter(name).copy_(parameter)

    def checkpoint_bytes(self) -> int:
        """Return the approximate bytes of a checkpoint of all ranks: masters, moments, averages and weights."""
        return sum(self._checkpoint_bytes())

    def own_checkpoint_bytes(self) -> int:
        """Return the approximate bytes of this rank's files: its part, and on rank 0 the weights below ZeRO-3."""
        split, whole = self._checkpoint_bytes()
        return split // world_size() + (whole if is_main() else 0)

    def _checkpoint_bytes(self) -> tuple[int, int]:
        """Return the bytes that all ranks share, and those that rank 0 writes alone: the weights below ZeRO-3."""
        parameters = [p for p in self.module.parameters() if p.requires_grad or self._saves_frozen_weights]
        weights = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
        states = (12 + 4 * len(self._averages)) * trained
        is_split = any(hasattr(p, "ds_numel") for p in parameters)
        return (states + weights, 0) if is_split else (states, weights)

    def checkpoint_files(self, *, client_state: Mapping[str, Any]) -> list[StateFile]:
        """Return this rank's files of a checkpoint, which share the engine's tensors; every rank must call this.

        client_state: plain values that read_checkpoint returns.
        """
        with quiet_output():
            files = self._notes.note(
                lambda: self._raw.save_checkpoint(
                    "checkpoints",  # folder and tag only make names: nothing is written yet
                    tag="step",
                    client_state={"ds_dpo": dict(client_state)},
                    save_latest=False,
                    exclude_frozen_parameters=not self._saves_frozen_weights,
                )
            )
        files += [average.file(self._raw.global_rank) for average in self._averages.values()]
        return files

    def layout_digest(self) -> str:
        """Return hex digits that are the same for engines that can load each other's checkpoints file by file."""
        return layout_digest(self._raw)

    def read_checkpoint_of_other_layout(self, folder: Path) -> dict[str, Any]:
        """Read a checkpoint that another number of ranks or ZeRO stage saved; every rank must call this.

        Returns its client_state. Raises CheckpointError on all ranks if it does not fit.
        """
        client_state = read_into(
            self._raw,
            folder,
            averages=list(self._averages.values()),
            has_frozen_weights=self._saves_frozen_weights,
        )
        return dict(client_state["ds_dpo"])

    def read_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Read weights, optimizer, schedule and counters from a checkpoint of the same layout; return its client_state.

        Raises CheckpointError if DeepSpeed finds nothing to load.
        """
        with quiet_output():
            path, client_state = self._raw.load_checkpoint(
                str(folder.parent), tag=folder.name, load_module_strict=self._saves_frozen_weights
            )
        if path is None:
            raise CheckpointError(f"DeepSpeed found no checkpoint in {folder}")
        self._let_scale_stay_least()  # the checkpoint replaced the scaler
        for average in self._averages.values():
            average.load(folder, self._raw.global_rank)
        return dict(client_state["ds_dpo"])


def build_engine(
    policy: nn.Module,
    *,
    settings: dict[str, Any],
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    max_train_steps: int,
    saves_frozen_weights: bool = True,
) -> Engine:
    """Wrap the policy with DeepSpeed, an optimizer of the trained parameters, and a learning-rate schedule.

    settings: the complete DeepSpeed settings. A skipped update does not advance the schedule. saves_frozen_weights:
    False if the model's file has these weights anyway.
    Raises ConfigError if the optimizer's package is missing or cannot count the weights, if a compiler is missing that
    an option needs, and if the device does not support the precision.
    """
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    zero = settings.get("zero_optimization", {})
    num_trained = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trainable)
    require_countable(optimizer, num_trained=num_trained, zero=zero, world_size=world_size())
    require_compiler(zero)
    if is_divided(policy):
        use_lean_linear(settings)
    updater = build_optimizer(trainable, optimizer)
    try:
        with quiet_output():
            raw, *_ = deepspeed.initialize(
                model=policy,
                model_parameters=trainable,
                optimizer=updater,
                lr_scheduler=partial(build_schedule, config=schedule, max_train_steps=max_train_steps),
                config={**UNTIMED, **settings},
                dist_init_required=False,
            )
    except ValueError as error:
        if "not supported" not in str(error):
            raise
        raise ConfigError(f"this device does not support the precision of deepspeed_config: {error}") from error
    give_groups_the_timeout()
    return Engine(raw, saves_frozen_weights=saves_frozen_weights)


def share_weights(module: nn.Module, *, settings: Mapping[str, Any]) -> nn.Module:
    """Divide a frozen module's weights among all ranks and return a callable that predicts as it does.

    Every rank must call this. settings: complete DeepSpeed settings of stage 3 (settings.reference_settings). A module
    that is whole is first moved to the device; of one that a Partitioner filled, each rank already has its part.
    DeepSpeed gathers the other parts in each forward pass.
    """
    with quiet_output():
        raw, *_ = deepspeed.initialize(model=module, config={**UNTIMED, **settings}, dist_init_required=False)
    give_groups_the_timeout()
    raw.eval()
    engine: nn.Module = raw
    return engine
