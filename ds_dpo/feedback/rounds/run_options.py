"""The training run of a round: its options from the file, and those that the round itself gives. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_dpo.config.command_line import PROGRAM_OPTIONS
from ds_dpo.config.identity import identity
from ds_dpo.config.load import load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import ConfigError, cut, shown
from ds_dpo.feedback.rounds.config import RoundsConfig

# what a round gives to its run: the file may not set it
GIVEN = {
    "output_dir": "each round has its own",
    "data.dataset": "a run trains on the pairs of its round",
    "data.format": "a run trains on the pairs of its round",
    "data.split": "a run trains on the pairs of its round",
    "data.labels": "the pairs of a round have labels",
    "data.cache": "the pairs of a round are new",
    "model.policy_init": "each round starts from the last one",
    "model.denoiser_init": "give the first model as a pipeline, in model.pretrained",
    "reference.cache": "the pairs of a round are new",
}
FLAT_NAMES = {"dataset": "data.dataset", "cache": "data.cache"}


def run_arguments(
    config: RoundsConfig, *, number: int, pairs: Path, run: Path | None = None, last: Path | None = None
) -> list[str]:
    """Return the arguments of train for a round. last: the run folder of the round before, None for the first.

    Raises ConfigError for an option that a round itself gives.
    """
    given: dict[str, Any] = {}
    for name, value in config.run.options.items():
        path = FLAT_NAMES.get(name, name)
        if path in GIVEN:
            raise ConfigError(f"run.options.{name} = {shown(value)}: {GIVEN[path]}; leave it out")
        if name in PROGRAM_OPTIONS:
            raise ConfigError(f"run.options.{cut(name)}: is no option of a run's configuration; leave it out")
        given[name] = value
    seed = given.pop("seed", None)
    words = [f"--config={config.run.config}", *(f"--{name}={_word(value)}" for name, value in given.items())]
    if seed is None:
        seed = load_config(words).config.seed
    own = {"seed": int(seed) + number - 1, "data.dataset": pairs, "data.format": "pickapic", "data.split": "train"}
    if run is not None:
        own["output_dir"] = run
    if last is not None:
        own["model.policy_init" if config.reference == "fixed" else "model.denoiser_init"] = last
    return [*words, *(f"--{name}={value}" for name, value in own.items())]


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(_word, value))
    return str(value)


def run_config(config: RoundsConfig, *, number: int, pairs: Path) -> RunConfig:
    """Return the configuration of a round's run. Raises ConfigError as train does, and for what rounds cannot do."""
    try:
        found = load_config(run_arguments(config, number=number, pairs=pairs)).config
    except ConfigError as error:
        raise ConfigError(f"run: {error}") from None
    if config.reference == "following" and found.adapter.type != "none":
        raise ConfigError(
            f"reference following: a run with adapter.type {found.adapter.type} has no whole denoiser that a reference "
            "could be; set reference to fixed"
        )
    return found


def identity_of(config: RoundsConfig) -> dict[str, Any]:
    """Return what makes these rounds what they are, by dotted name, as JSON values: a change is refused."""
    values = config.model_dump(mode="json", exclude={"output_dir", "rounds", "votes", "launch", "run"})
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {name: value}
    run = run_config(config, number=1, pairs=Path("pairs.parquet"))
    own = identity(run, "")
    return flat | {f"run: {name}": own[name] for name in own if name not in {*GIVEN, "precision"}}
