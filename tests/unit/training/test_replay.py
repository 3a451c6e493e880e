"""A replay takes the weights of its own run alone."""

from pathlib import Path

import pytest
import torch

from ds_dpo.checkpoints.identity import identity_of
from ds_dpo.config.load import load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.engine.settings import resolve_deepspeed
from ds_dpo.errors import CheckpointError
from ds_dpo.run_folder.folder import RunFolder
from ds_dpo.storage.manifest import Manifest, hash_file, write_manifest
from ds_dpo.training.replay import _newest_before, _Run, replay_step


def configured(*options: str) -> RunConfig:
    return load_config(["--config", "miniature", "--deepspeed_config", "zero2_fp32_cpu", *options]).config


def save(folder: RunFolder, step: int, config: RunConfig) -> Path:
    """A checkpoint of a run with this configuration, with one small file."""
    identity = identity_of(config, resolve_deepspeed(config, world_size=1))
    path = folder.checkpoints / f"step_{step:08d}"
    path.mkdir(parents=True)
    torch.save({}, path / "mp_rank_00_model_states.pt")
    files = {file.name: hash_file(file) for file in path.iterdir()}
    write_manifest(
        path,
        Manifest(
            step=step,
            world_size=1,
            stage=2,
            precision=identity.precision,
            fingerprint=identity.fingerprint,
            run=identity.as_saved(),
            files=files,
        ),
    )
    return path


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    config = configured()
    resolved = resolve_deepspeed(config, world_size=1)
    run = RunFolder(tmp_path / "run")
    run.write_start(config, resolved.settings, world_size=1, data={})
    return run


def test_a_newer_one_of_another_run_is_passed_over_by_name(folder: RunFolder) -> None:
    own = save(folder, 2, configured())
    foreign = save(folder, 5, configured("--seed", "7"))
    said: list[str] = []
    assert _newest_before(folder, 9, identity=_Run(folder.path).identity, say=said.append) == own
    assert said == [f"skipped: {foreign} belongs to another run, which differs in seed: 7 -> 0 (there -> here)"]


def test_one_of_another_run_that_is_asked_for_is_refused(folder: RunFolder) -> None:
    foreign = save(folder, 5, configured("--objective.beta", "7"))
    with pytest.raises(
        CheckpointError, match=r"step_00000005 belongs to another run.* objective\.beta: 7\.0 -> 500\.0"
    ):
        replay_step(folder.path, 6, checkpoint=foreign, detect_anomaly=False, say=lambda line: None)
    with pytest.raises(CheckpointError, match="has no checkpoint of a step before 6"):
        replay_step(folder.path, 6, checkpoint=None, detect_anomaly=False, say=lambda line: None)
