"""Whatever can be refused without models is refused before any is loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ds_dpo.checkpoints.identity import identity_of
from ds_dpo.config.load import load_config
from ds_dpo.distributed.environment import read_environment
from ds_dpo.engine.settings import resolve_deepspeed
from ds_dpo.errors import DsDpoError
from ds_dpo.run_folder.folder import RunFolder
from ds_dpo.run_folder.log import RunLog
from ds_dpo.storage.manifest import FileEntry, Manifest, write_manifest
from ds_dpo.supervision.rank import Supervision
from ds_dpo.training import assembly, building, opening

USUAL = ("--config=miniature", "--deepspeed_config=zero2_fp32_cpu", "--pairs_per_step=4", "--micro_batch_pairs=4")


def start(run: Path, *options: str) -> None:
    loaded = load_config([*USUAL, f"--output_dir={run}", *options])
    place = read_environment({})
    resolved = resolve_deepspeed(loaded.config, world_size=1)
    supervision, log = Supervision(loaded.config, {}), RunLog(speaks=True)
    assembly.train(loaded.config, resolved, place, supervision, log=log, resume=loaded.resume)


class ModelsLoadedError(Exception):
    pass


@pytest.fixture(autouse=True)
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise ModelsLoadedError

    monkeypatch.setattr(building, "load_models", load)
    monkeypatch.setattr(opening, "start_communication", lambda **options: None)


def is_a_file(run: Path) -> None:
    run.touch()


def has_checkpoints_that_cannot_be_written(run: Path) -> None:
    run.mkdir()
    (run / "checkpoints").symlink_to("/proc/none")


def holds_another_run(run: Path) -> None:
    config = load_config([*USUAL, f"--output_dir={run}", "--seed=7"]).config
    RunFolder(run).write_start(config, resolve_deepspeed(config, world_size=1).settings, world_size=1, data={})


def has_a_checkpoint_of(run: Path, *options: str) -> None:
    config = load_config([*USUAL, f"--output_dir={run}", *options]).config
    identity = identity_of(config, resolve_deepspeed(config, world_size=1))
    folder = run / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    write_manifest(
        folder,
        Manifest(
            step=4,
            world_size=1,
            stage=2,
            precision=identity.precision,
            fingerprint=identity.fingerprint,
            files={"a.pt": FileEntry(size=0, sha256="")},
            run=identity.as_saved(),
        ),
    )


def has_a_copied_checkpoint(run: Path) -> None:
    has_a_checkpoint_of(run, "--seed=7")


def nothing(run: Path) -> None:
    pass


REFUSED: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "file": (is_a_file, (), "is a file, not a folder"),
    "checkpoints": (has_checkpoints_that_cannot_be_written, (), "checkpoints is a link that leads nowhere"),
    "another run": (holds_another_run, (), r"seed: 7 -> 0"),
    "copied checkpoint": (
        has_a_copied_checkpoint,
        (),
        "no checkpoint in .* can be used: .*step_00000004 belongs to another run, which differs in seed: 7 -> 0",
    ),
    "copied checkpoint by its step": (
        has_a_copied_checkpoint,
        ("--resume=4", "--objective.beta=7"),
        "differs in seed: 7 -> 0; objective.beta: 500.0 -> 7.0",
    ),
    "no held-out set": (
        nothing,
        ("--held_out.every_steps=2", "--held_out.dataset=/nowhere/pairs"),
        "/nowhere/pairs",
    ),
    "no such held-out split": (nothing, ("--held_out.every_steps=2", "--held_out.split=none_such"), "none_such"),
    "too few timesteps": (
        nothing,
        (
            "--held_out.every_steps=2",
            "--held_out.split=validation_unique",
            "--diffusion.min_timestep=5",
            "--diffusion.max_timestep=8",
        ),
        "held_out needs at least 10 timesteps",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_before_models_are_loaded(tmp_path: Path, case: str) -> None:
    make, options, message = REFUSED[case]
    make(tmp_path / "run")
    with pytest.raises(DsDpoError, match=message):
        start(tmp_path / "run", *options)


def test_a_start_that_fits_goes_on_to_its_models_and_has_written_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelsLoadedError):
        start(tmp_path / "run", "--held_out.every_steps=2", "--held_out.split=validation_unique")
    assert list(tmp_path.iterdir()) == []


def test_one_checkpoint_of_the_run_is_enough_to_go_on_to_the_models(tmp_path: Path) -> None:
    has_a_checkpoint_of(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_00000009").mkdir()  # without a manifest
    with pytest.raises(ModelsLoadedError):
        start(tmp_path / "run")
