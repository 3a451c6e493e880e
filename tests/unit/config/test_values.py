"""What a written value means for its field, in a file and on the command line alike."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from ds_dpo.config.fields import FIELDS
from ds_dpo.config.load import config_from_yaml, config_to_yaml, load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import ConfigError

WAYS = ("file", "command line")
HOME = "/home/somebody"


def load(folder: Path, way: str, *given: tuple[str, str]) -> RunConfig:
    """Return the miniature's configuration with fields given as words, by a YAML file or as options."""
    if way == "command line":
        return load_config(["--config", "miniature", *(f"--{name}={word}" for name, word in given)]).config
    lines = ["base: miniature", *(f"{name}: {word}" for name, word in given)]
    (folder / "run.yaml").write_text("\n".join(lines), encoding="utf-8")
    return load_config(["--config", str(folder / "run.yaml")]).config


def value_of(config: RunConfig, path: str) -> Any:
    section, _, name = path.rpartition(".")
    return getattr(getattr(config, section) if section else config, name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("word", ["none", "None", "NONE", "null", "~"])
def test_none_unsets_every_optional_field(tmp_path: Path, way: str, word: str) -> None:
    paths = [path for path, spec in FIELDS.items() if spec.is_optional and path != "objective.shift"]
    paths.remove("cadence.save_every_steps")  # a run without any checkpoint is refused
    assert len(paths) > 30
    config = load(tmp_path, way, *((path, word) for path in paths))
    assert {path for path in paths if value_of(config, path) is not None} == set()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("seed", "seed = none: the option must have a value; leave it out for 0"),
        ("data.split", "data.split = none: the option must have a value; leave it out for train"),
        ("output_dir", "output_dir = none: the option must have a value"),
        ("deterministic", "must have a value; leave it out for false"),
        ("data.flip", "data.flip = none: the option must have a value; leave it out for off"),
    ],
)
def test_none_is_refused_where_a_value_is_needed(tmp_path: Path, way: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path, way, (path, "none"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_none_empties_a_list(tmp_path: Path, way: str, word: str) -> None:
    paths = ("trackers", "model.train", "data.files", "data.columns", "data.models", "validation.prompts")
    config = load(tmp_path, way, *((path, word) for path in (*paths, "cadence.sample_every_steps")))
    assert [list(value_of(config, path)) for path in paths] == [[]] * len(paths)


@pytest.mark.parametrize("way", WAYS)
def test_none_is_a_choice_where_it_is_one(tmp_path: Path, way: str) -> None:
    for word in ("none", "null"):
        assert load(tmp_path, way, ("adapter.type", word)).adapter.type == "none"
        assert load(tmp_path, way, ("diffusion.error_weighting", word)).diffusion.error_weighting == "none"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("path", "word", "value"),
    [
        ("seed", "010", 10),
        ("seed", "0x10", 16),
        ("seed", "1_000", 1000),
        ("max_train_steps", "1e3", 1000),
        ("learning_rate", "1e-8", 1e-8),
        ("data.split", "010", "010"),
        ("data.split", "on", "on"),
        ("data.split", "true", "true"),
        ("data.split", "1.50", "1.50"),
        ("model.revision", "2024-01-01", "2024-01-01"),
        ("model.revision", "12e4567", "12e4567"),
        ("model.revision", "0123456", "0123456"),
        ("data.flip", "off", "off"),
        ("data.size_conditioning", "true", "true"),
        ("data.size_conditioning", "True", "true"),
        ("model.gradient_checkpointing", "no", "none"),
        ("model.gradient_checkpointing", "false", "none"),
        ("model.gradient_checkpointing", "none", "none"),
        ("model.gradient_checkpointing", "0", "none"),
        ("model.gradient_checkpointing", "on", "all"),
        ("model.gradient_checkpointing", "True", "all"),
        ("model.gradient_checkpointing", "auto", "auto"),
        ("model.gradient_checkpointing", "12", 12),
    ],
)
def test_a_word_is_read_as_its_field_needs(tmp_path: Path, way: str, path: str, word: str, value: Any) -> None:
    config = load(tmp_path, way, (path, word))
    assert value_of(config, "optimizer.learning_rate" if path == "learning_rate" else path) == value
    (tmp_path / "saved.yaml").write_text(config_to_yaml(config))
    assert config_from_yaml(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("path", "word", "message"),
    [
        ("max_train_steps", "1:30", "max_train_steps = 1:30: Input should be a valid integer"),
        ("seed", "2024-01-01", "seed = 2024-01-01"),
        ("seed", "true", "seed = true: the option is not a switch"),
        ("seed", "9" * 5000, "9999999999 ... 9999"),
        ("learning_rate", "1e999", "optimizer.learning_rate = inf"),
        ("model.gradient_checkpointing", "2024-01-01", "model.gradient_checkpointing = 2024-01-01: give all, none"),
        ("model.gradient_checkpointing", "-1", "model.gradient_checkpointing = -1: give all, none, auto, or a number"),
        (
            "model.gradient_checkpointing",
            "1.5",
            "model.gradient_checkpointing = 1.5: give all, none, auto, or a number",
        ),
    ],
)
def test_a_word_that_means_something_else_is_refused(
    tmp_path: Path, way: str, path: str, word: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, way, (path, word))
    assert message in str(refused.value)
    assert len(str(refused.value)) < 500


def test_words_of_a_list_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base: miniature\nvalidation: {prompts: [yes, 1.0, 2024-01-01, 010, none], seeds: [010, 0x1F]}\n")
    validation = load_config(["--config", str(path)]).config.validation
    assert validation.prompts == ["yes", "1.0", "2024-01-01", "010", "none"]
    assert validation.seeds == [10, 31]


@pytest.mark.parametrize("blank", ["", " ", "\t"])
def test_an_empty_text_is_refused(tmp_path: Path, blank: str) -> None:
    texts = [path for path, spec in FIELDS.items() if spec.kind is str and not spec.choices and not spec.is_list]
    assert {"output_dir", "model.vae", "data.dataset"} <= set(texts)
    for path in texts:
        for arguments in ([f"--{path}={blank}"], ["--config", quoted(tmp_path, path, blank)]):
            with pytest.raises(ConfigError, match=rf"{re.escape(path)} is empty; give a value"):
                load_config(arguments)


def quoted(folder: Path, path: str, text: str) -> str:
    (folder / "quoted.yaml").write_text(f'base: miniature\n{path}: "{text}"\n')
    return str(folder / "quoted.yaml")


def test_a_text_with_a_nul_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="NUL"):
        load_config(["--config", quoted(tmp_path, "output_dir", r"a\0b")])


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", HOME)


PATHS = [path for path, spec in FIELDS.items() if re.search(r"\b[Ff](?:older|ile)s?\b", spec.description)]
NOT_PATHS = {"model.variant"}


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("way", WAYS)
def test_a_home_folder_is_meant_in_every_path(tmp_path: Path, way: str) -> None:
    paths = [path for path in PATHS if FIELDS[path].kind is str and not FIELDS[path].choices and path not in NOT_PATHS]
    paths = [path for path in paths if not FIELDS[path].is_list]
    assert {"output_dir", "model.pretrained", "model.vae", "data.dataset", "held_out.dataset", "data.cache"} <= set(
        paths
    )
    given = [(path, "~/x") for path in paths]
    config = load(tmp_path, way, *given, ("reference.residency", "cached"))
    assert {path: value_of(config, path) for path in paths} == dict.fromkeys(paths, f"{HOME}/x")


@pytest.mark.usefixtures("home")
def test_a_home_folder_of_a_user_is_meant_too(tmp_path: Path) -> None:
    root = os.path.expanduser("~root")
    assert load(tmp_path, "command line", ("output_dir", "~root/x")).output_dir == f"{root}/x"
    with pytest.raises(ConfigError, match=r"output_dir = ~nobody_here/x: there is no home folder of user nobody_here"):
        load(tmp_path, "command line", ("output_dir", "~nobody_here/x"))
    (tmp_path / "run.yaml").write_text("base: miniature\nseed: 4\n")
    os.environ["HOME"] = str(tmp_path)
    assert load_config(["--config", "~/run.yaml"]).config.seed == 4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "field", ["output_dir", "deepspeed_config", "data.dataset", "held_out.dataset", "model.pretrained", "model.vae"]
)
def test_a_name_that_no_file_can_have_is_refused_by_its_field(tmp_path: Path, way: str, field: str) -> None:
    for word, said in [
        ("a/" + "x" * 300, "a name in the path has 300 bytes; 255 are the most"),
        ("é" * 128, "a name in the path has 256 bytes"),
        ("x/" * 2048, "the path has 4096 bytes; 4095 are the most"),
    ]:
        with pytest.raises(ConfigError, match=rf"{re.escape(field)} = .*{said}") as refused:
            load(tmp_path, way, (field, word))
        assert len(str(refused.value)) < 500
    load(tmp_path, way, (field, "x" * 255))


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".yaml", "a/" * 3000])
def test_a_configuration_with_such_a_name_is_refused_too(tmp_path: Path, name: str) -> None:
    (tmp_path / "run.yaml").write_text(f"base: {name}\n")
    for asked in (name, str(tmp_path / "run.yaml")):
        with pytest.raises(ConfigError, match=r"bytes; \d+ are the most that a") as refused:
            load_config(["--config", asked])
        assert len(str(refused.value)) < 500
