"""Every model of a run is on its device once it is loaded, whoever uses it later."""

from __future__ import annotations

from pathlib import Path

import torch

from ds_dpo.config.load import load_config
from ds_dpo.distributed.environment import read_environment
from ds_dpo.engine.settings import resolve_deepspeed
from ds_dpo.training.models import load_models
from ds_dpo.training.start import Start


def test_encoders_are_moved_where_they_are_loaded(tmp_path: Path) -> None:
    """With a cache nothing encodes, but validation images are drawn with the VAE and the text encoders."""
    config = load_config(["--config", "miniature", "--objective.type=sft", f"--output_dir={tmp_path}"]).config
    lines: list[str] = []
    models = load_models(
        config,
        resolve_deepspeed(config, world_size=1),
        read_environment({}),
        device=torch.device("meta"),
        with_encoders=True,
        start=Start(say=lines.append, is_asked=lambda: False),
    )
    assert models.encoders is not None
    modules = [models.policy, models.encoders.vae, *(tower.encoder for tower in models.encoders.text.towers)]
    assert len(modules) == 4
    assert [{parameter.device.type for parameter in module.parameters()} for module in modules] == [{"meta"}] * 4
    assert any("its ranks load the denoiser one after another" in line for line in lines)
