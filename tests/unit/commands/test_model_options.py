"""Models that programs are given by name: ~ is the home folder, and none is no model, as in a configuration."""

from collections.abc import Callable
from typing import Any

import pytest

from ds_dpo.commands import consolidate, evaluate, generate
from ds_dpo.launch.arguments import parse_launch


def of_consolidate(option: str, value: str) -> Any:
    return getattr(consolidate.parse_arguments(["run", "out", f"--{option}", value]), option)


def of_generate(option: str, value: str) -> Any:
    if option in ("model", "lora"):
        parsed = generate.parse_arguments(["--model", value, "--lora", value])
        return {"model": parsed.models[0][0], "lora": parsed.models[0][1][0]}[option]
    return getattr(generate.parse_arguments(["--model", "a/b", f"--{option}={value}"]), option)


def of_evaluate(option: str, value: str) -> Any:
    given = {"base": "a/b", "tuned": "a/b", "out": "out", option: value}
    return getattr(evaluate.parse_arguments([f"--{name}={text}" for name, text in given.items()]), option)


NEEDED: list[tuple[Callable[[str, str], Any], str]] = [
    (of_generate, "model"),
    (of_generate, "lora"),
    (of_evaluate, "base"),
    (of_evaluate, "tuned"),
]
OPTIONAL: list[tuple[Callable[[str, str], Any], str]] = [
    (of_consolidate, "base"),
    (of_consolidate, "vae"),
    (of_generate, "base"),
    (of_generate, "vae"),
    (of_evaluate, "sft"),
]
VARIANTS = [(of_consolidate, "variant"), (of_generate, "variant")]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")


@pytest.mark.parametrize(("parse", "option"), [*NEEDED, *OPTIONAL])
def test_a_model_may_be_in_the_home_folder(parse: Callable[[str, str], Any], option: str) -> None:
    assert parse(option, "~/models/a.safetensors:0.5") == "/home/somebody/models/a.safetensors:0.5"
    assert parse(option, "owner/name") == "owner/name"


@pytest.mark.parametrize(("parse", "option"), [*OPTIONAL, *VARIANTS])
@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_none_is_no_model(parse: Callable[[str, str], Any], option: str, word: str) -> None:
    assert parse(option, word) is None


@pytest.mark.parametrize(("parse", "option"), [*NEEDED, *OPTIONAL, *VARIANTS])
def test_an_empty_name_is_refused(
    parse: Callable[[str, str], Any], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(option, " ")
    assert ended.value.code == 2
    assert "is empty" in capsys.readouterr().err


def test_a_hostfile_may_be_in_the_home_folder() -> None:
    launch = parse_launch(["--hostfile=~/hosts", "train.py"])
    assert str(launch.hostfile) == "/home/somebody/hosts"
    assert launch.launcher_arguments == ("--hostfile=~/hosts", "--hostfile", "/home/somebody/hosts")
