"""The policy UNet inside a DeepSpeed engine: updates, master weights, and DeepSpeed's own checkpoint calls."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_dpo.config.optimization import OptimizerConfig, ScheduleConfig
from ds_dpo.distributed.collectives import is_main, world_size
from ds_dpo.engine.elastic import read_into
from ds_dpo.engine.layout import engine_layout, layout_digest, master_groups
from ds_dpo.engine.learning_rate import build_schedule
from ds_dpo.engine.moving_average import MovingAverage, average_file_name
from ds_dpo.engine.noting_engine import NotingCheckpointEngine
from ds_dpo.engine.optimizers import build_optimizer
from ds_dpo.errors import CheckpointError, ConfigError
from ds_dpo.process.quiet import quiet_output
from ds_dpo.storage.state_files import StateFile

with quiet_output():  # DeepSpeed probes compilers and drivers aloud when imported
    import deepspeed

_PIECE_ELEMENTS = 2**25  # 64 MiB in 16 bits


class Engine:
    """A thin face of deepspeed.DeepSpeedEngine: what the trainer needs, in the project's words."""

    def __init__(self, raw: Any, *, saves_frozen_weights: bool = True) -> None:
        """saves_frozen_weights: whether checkpoints hold the weights that are not trained too."""
        self._raw = raw
        self._notes = raw.checkpoint_engine = NotingCheckpointEngine(raw.checkpoint_engine)
        # a script of its own beside the checkpoints: the one thing that a save would still write itself
        raw._copy_recovery_script = lambda save_path: None
        self._saves_frozen_weights = saves_frozen_weights
        self._average: MovingAverage | None = None
        self._let_scale_stay_least()

    @property
    def policy(self) -> nn.Module:
        """The callable that predicts; forward passes go through it so that ZeRO's hooks run."""
        return self._raw

    @property
    def module(self) -> nn.Module:
        """The wrapped UNet itself, for its configuration and for sampling."""
        return self._raw.module

    @property
    def device(self) -> torch.device:
        return self._raw.device

    @property
    def learning_rate(self) -> float:
        """The rate that the next update will use."""
        return float(self._raw.optimizer.param_groups[0]["lr"])

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply the rate from the next update on, and all that the schedule makes of it; part of checkpoints."""
        schedule = self._raw.lr_scheduler
        schedule.base_lrs = [factor * rate for rate in schedule.base_lrs]
        for group in self._raw.optimizer.param_groups:
            group["lr"] *= factor

    @property
    def gradient_norm(self) -> float | None:
        """The 2-norm over all gradients of the last update, before clipping; None where there is none."""
        norm = self._raw.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def skipped_steps(self) -> int:
        """How many updates were left out since the start because a loss or a gradient was not finite."""
        return int(self._raw.skipped_steps)

    @property
    def loss_scale(self) -> float | None:
        """The fp16 loss scale; None in other precisions."""
        if not self._raw.fp16_enabled():
            return None
        return float(self._raw.optimizer.loss_scale)

    @property
    def least_loss_scale(self) -> float | None:
        """How far an overflow may lower the fp16 loss scale; None where it stays what it is, and without fp16."""
        scaler: Any = getattr(self._raw.optimizer, "loss_scaler", None)
        return float(scaler.min_scale) if getattr(scaler, "dynamic", False) else None

    def _let_scale_stay_least(self) -> None:
        """Keep DeepSpeed from ending the run, in a way of its own, at the first overflow of the least loss scale."""
        if self.least_loss_scale is not None:
            self._raw.optimizer.loss_scaler.raise_error_at_min_scale = False

    def backward_and_step(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient; at the last of an accumulation DeepSpeed also updates the weights.

        loss: scalar, the mean over the micro-batch; DeepSpeed divides by the number of accumulations. Where it, or a
        gradient, is not finite on any rank, all leave this update out: weights, moments, rate and average stay.
        """
        # DeepSpeed looks at the norm of all ranks' gradients alone, and a loss can be inf over a finite gradient. The
        # factor is 1, to the bit, or NaN, which reaches that norm: no rank asks its device or another rank for it.
        self._raw.backward(loss * (1 + 0 * loss.detach()))
        updates_before = self._raw.global_steps - self._raw.skipped_steps
        self._raw.step()
        if self._average is not None and self._raw.global_steps - self._raw.skipped_steps > updates_before:
            self._average.update(self.flat_master_groups())

    def keep_average(self, *, decay: float) -> None:
        """Keep a moving average of the master weights from now on; it becomes part of checkpoints."""
        self._average = MovingAverage(self.flat_master_groups(), decay=decay)

    def flat_master_groups(self) -> list[Tensor]:
        """Return this rank's fp32 master weights as DeepSpeed holds and saves them: 1-D, one for each group."""
        optimizer = self._raw.optimizer
        groups = master_groups(optimizer)
        # ZeRO 1 and 2 save the last rank's part without the padding at its end
        unpadded = getattr(optimizer, "_get_groups_without_padding", None)
        return groups if unpadded is None else list(unpadded(groups))

    @torch.no_grad()
    def set_master_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Start the fp32 master weights from the file's own values, not from their 16-bit rounding.

        DeepSpeed copies the master from the already rounded module. Only this rank's part of each tensor is
        written, one tensor at a time, so a mapping that reads lazily from files costs no memory.
        """
        layout = engine_layout(self._raw)
        for part in layout.parts:
            part.of(layout.masters).copy_(weights[part.name].flatten()[part.start : part.start + part.numel])

    @torch.no_grad()
    def copy_weights_to(self, module: nn.Module) -> None:
        """Give a plain module the weights that the policy computes with, not the master ones; every rank must call.

        Under ZeRO-3 they are gathered a piece at a time, so that the policy is never whole on a device.
        """
        for piece in _pieces(self.module):
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in piece]):  # a no-op below stage 3
                for name, parameter in piece:
                    module.get_parameter(name).copy_(parameter)

    def checkpoint_bytes(self) -> int:
        """Return about how many bytes a checkpoint of all ranks takes: master, moments, average, and the weights."""
        return sum(self._checkpoint_bytes())

    def own_checkpoint_bytes(self) -> int:
        """Return about how many of them are in this rank's files: its part, and below ZeRO-3 on rank 0 the weights."""
        split, whole = self._checkpoint_bytes()
        return split // world_size() + (whole if is_main() else 0)

    def _checkpoint_bytes(self) -> tuple[int, int]:
        """Return how much all ranks share, and how much rank 0 writes alone: below ZeRO-3 the weights."""
        parameters = [p for p in self.module.parameters() if p.requires_grad or self._saves_frozen_weights]
        weights = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
        states = (12 if self._average is None else 16) * trained
        is_split = any(hasattr(p, "ds_numel") for p in parameters)
        return (states + weights, 0) if is_split else (states, weights)

    def checkpoint_files(self, *, client_state: Mapping[str, Any]) -> list[StateFile]:
        """Return this rank's files of a checkpoint, the engine's own state in them; every rank must call.

        client_state: plain values that read_checkpoint gives back.
        """
        with quiet_output():
            files = self._notes.note(
                lambda: self._raw.save_checkpoint(
                    "checkpoints",  # folder and tag are for names alone: nothing is written yet
                    tag="step",
                    client_state={"ds_dpo": dict(client_state)},
                    save_latest=False,
                    exclude_frozen_parameters=not self._saves_frozen_weights,
                )
            )
        if self._average is not None:
            files.append(self._average.file(average_file_name(self._raw.global_rank)))
        return files

    def layout_digest(self) -> str:
        """Return what is the same for engines that can load each other's checkpoints file by file, as hex digits."""
        return layout_digest(self._raw)

    def read_checkpoint_of_other_layout(self, folder: Path) -> dict[str, Any]:
        """Do what read_checkpoint does with one that other ranks or another ZeRO stage saved; every rank must call.

        Raises CheckpointError on all ranks together where it cannot be carried over.
        """
        client_state = read_into(
            self._raw, folder, average=self._average, has_frozen_weights=self._saves_frozen_weights
        )
        return dict(client_state["ds_dpo"])

    def read_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Load weights, optimizer, schedule and counters from such a folder and return its client_state.

        Raises CheckpointError where DeepSpeed finds nothing to load.
        """
        with quiet_output():
            path, client_state = self._raw.load_checkpoint(
                str(folder.parent), tag=folder.name, load_module_strict=self._saves_frozen_weights
            )
        if path is None:
            raise CheckpointError(f"DeepSpeed found no checkpoint in {folder}")
        self._let_scale_stay_least()  # the scaler came with the checkpoint
        if self._average is not None:
            self._average.load(folder / average_file_name(self._raw.global_rank))
        return dict(client_state["ds_dpo"])


def _pieces(module: nn.Module) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Yield a module's parameters by name, several at a time, of about _PIECE_ELEMENTS together."""
    piece: list[tuple[str, nn.Parameter]] = []
    num_elements = 0
    for name, parameter in module.named_parameters():
        piece.append((name, parameter))
        num_elements += getattr(parameter, "ds_numel", parameter.numel())
        if num_elements >= _PIECE_ELEMENTS:
            yield piece
            piece, num_elements = [], 0
    if piece:
        yield piece


def build_engine(
    unet: nn.Module,
    *,
    settings: dict[str, Any],
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    max_train_steps: int,
    saves_frozen_weights: bool = True,
) -> Engine:
    """Wrap the policy UNet with DeepSpeed, an optimizer over what requires gradients, and a learning-rate schedule.

    settings: the complete DeepSpeed dict. The rate follows applied updates only: a skipped one does not advance it.
    saves_frozen_weights: False where the model's file has them anyway.
    Raises ConfigError where the optimizer's package is missing or the device cannot do the precision asked for.
    """
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    offloads = "offload_optimizer" in settings.get("zero_optimization", {})
    updater = build_optimizer(trainable, optimizer, fused=torch.cuda.is_available() and not offloads)
    try:
        with quiet_output():
            raw, *_ = deepspeed.initialize(
                model=unet,
                model_parameters=trainable,
                optimizer=updater,
                lr_scheduler=partial(build_schedule, config=schedule, max_train_steps=max_train_steps),
                config=settings,
                dist_init_required=False,
            )
    except ValueError as error:
        if "not supported" not in str(error):
            raise
        raise ConfigError(f"the precision of deepspeed_config does not run on this device: {error}") from error
    return Engine(raw, saves_frozen_weights=saves_frozen_weights)


def share_weights(module: nn.Module, *, settings: Mapping[str, Any]) -> nn.Module:
    """Return a callable that predicts as a frozen module does, its weights shared by all ranks; every rank must call.

    settings: a complete DeepSpeed dict of stage 3 (deepspeed_config.reference_settings). The whole module goes to the
    device first, where it is not there yet; DeepSpeed then keeps this rank's part of each parameter, and brings the
    others' for each forward pass.
    """
    with quiet_output():
        raw, *_ = deepspeed.initialize(model=module, config=dict(settings), dist_init_required=False)
    raw.eval()
    engine: nn.Module = raw
    return engine


def start_communication(*, timeout: timedelta, device: torch.device) -> None:
    """Join all ranks in one process group: NCCL on GPUs, gloo on CPUs; the environment names the ranks."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # its shared-memory collectives for CPUs want a C++ compiler and minutes of compiling; gloo is there anyway
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with quiet_output():
        deepspeed.init_distributed(timeout=timeout, verbose=False)


def pick_device(local_rank: int) -> torch.device:
    """Return this rank's device: its GPU where DeepSpeed's accelerator is CUDA, else the CPU."""
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    return torch.device("cpu") if name == "cpu" else torch.device(name, local_rank)


def silence_deepspeed() -> None:
    """Let DeepSpeed speak only of errors; the run's own log says what a user needs."""
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
