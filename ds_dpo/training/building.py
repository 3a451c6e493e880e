"""The second phase of a run: models loaded, held-out pairs encoded, the policy in its engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_dpo.distributed.together import raised_everywhere
from ds_dpo.encoding.feed import PairFeed
from ds_dpo.engine.engine import Engine, build_engine
from ds_dpo.models.contents import ModelContents
from ds_dpo.models.loading import file_weights
from ds_dpo.models.policy_start import PolicyStart, open_policy_start
from ds_dpo.models.start import checkpoint_start
from ds_dpo.reference.cache.feed import with_reference_errors
from ds_dpo.training.belonging import require_same_models
from ds_dpo.training.models import Models, load_models
from ds_dpo.training.opening import OpenedRun
from ds_dpo.watch.held_out.pairs import HeldOutPairs
from ds_dpo.watch.held_out.setup import load_held_out


@dataclass(frozen=True, kw_only=True)
class BuiltRun:
    """A run with its models on their device. feed: with the errors of the cached reference, if the run has one.

    contents: those of the models' files. held_out_pairs: None if the run evaluates none.
    """

    opened: OpenedRun
    contents: ModelContents
    models: Models
    engine: Engine
    feed: PairFeed
    held_out_pairs: HeldOutPairs | None

    def start_weights(self) -> None:
        """Give a new run the fp32 master weights of its files, instead of their rounding to the run's precision."""
        config = self.opened.config
        if self.models.adapter is None:  # the weights of an adapter are not in the files
            self.engine.set_master_weights(checkpoint_start(config.model) or file_weights(config.model))
        self.keep_average()  # again, from the values of the files

    def policy_start(self) -> PolicyStart | None:
        """Return the weights of model.policy_init, compared with the policy's names and shapes; None if it is unset.

        Every rank calls it. Raises ModelError or CheckpointError on all ranks.
        """
        with raised_everywhere():
            return open_policy_start(
                self.opened.config.model, self.engine.module, has_adapter=self.models.adapter is not None
            )

    def begin_from(self, start: PolicyStart) -> None:
        """Give the policy other weights than the reference has; every rank calls it."""
        model = self.opened.config.model
        self.engine.set_weights(start)
        self.keep_average()  # again, from these
        self.opened.log.line(
            f"policy: starts from {start.source} ({len(start)} tensors); the reference stays "
            f"{model.denoiser_init or model.pretrained}, with whose weights the preflight compared both"
        )

    def keep_average(self) -> None:
        """Keep a moving average of the weights, if the configuration asks for one."""
        decay = self.opened.config.ema.decay
        if decay is not None:
            self.engine.keep_average(decay=decay)


def build_run(opened: OpenedRun) -> BuiltRun:
    """Load what the run needs and give the policy its engine; every rank calls it. Raises DsDpoError on all ranks."""
    config, resolved, place, start = opened.config, opened.resolved, opened.place, opened.start
    with_encoders = opened.keeps_encoders or opened.held_out is not None
    start.part(f"comparing the files of {config.model.pretrained} with those of the run")
    contents = require_same_models(config, opened.folder, place, with_encoders=with_encoders)
    models = load_models(
        config,
        resolved,
        place,
        device=opened.device,
        with_encoders=with_encoders,
        start=start,
    )
    held_out_pairs = None
    if opened.held_out is not None:
        assert models.encoders is not None, "loaded if held-out pairs are encoded"
        start.part(f"encoding {config.held_out.num_pairs} held-out pairs")
        held_out_pairs = load_held_out(
            config, opened.held_out, models.encoders, device=opened.device, say=opened.log.line
        )
    if not opened.keeps_encoders:
        models = replace(models, encoders=None)
    feed = opened.feed
    if opened.errors is not None:
        feed = with_reference_errors(
            feed, opened.errors, config=config, start=models.start, precision=resolved.precision
        )
    start.part("preparing DeepSpeed's engine")
    engine = build_engine(
        models.policy,
        settings=resolved.settings,
        optimizer=config.optimizer,
        schedule=config.schedule,
        max_train_steps=config.max_train_steps,
        # the export of an adapter reads the frozen weights from model.pretrained
        saves_frozen_weights=models.adapter is None or config.model.denoiser_init is not None,
    )
    return BuiltRun(
        opened=opened,
        contents=contents,
        models=models,
        engine=engine,
        feed=feed,
        held_out_pairs=held_out_pairs,
    )
