"""--resume names a checkpoint, or refuses a folder that has some."""

from pathlib import Path

import pytest

from ds_dpo.config.load import load_config
from ds_dpo.errors import ConfigError
from ds_dpo.run_folder.resuming import Resume, require_resumable


def folder_with(tmp_path: Path, *steps: int) -> Path:
    for step in steps:
        (tmp_path / f"step_{step:08d}").mkdir()
    (tmp_path / "step_00000900.rolled_back").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("steps", "resume", "said"),
    [
        ((), "never", None),
        ((), None, None),
        ((200, 400), None, None),
        ((200, 400), 200, None),
        ((200, 400), "never", "--resume never, but .* has checkpoints, the newest of step 400: leave --resume out"),
        ((200, 400), 300, "--resume 300: .* has no step_00000300; it has steps 400, 200$"),
        ((200,), 900, "--resume 900: .* has no step_00000900; it has steps 200$"),
        ((), 0, "--resume 0: .* it has no checkpoint at all"),
        ((200, 1000), 1000, "--resume 1000: max_train_steps 1000 leaves no step to train after it"),
        (tuple(range(1, 12)), 20, "it has steps 11, 10, 9, 8, 7, 6, 5, 4 and older ones"),
    ],
)
def test_what_is_asked_for_must_be_there(
    tmp_path: Path, steps: tuple[int, ...], resume: Resume, said: str | None
) -> None:
    checkpoints = folder_with(tmp_path, *steps)
    if said is None:
        require_resumable(checkpoints, resume, max_train_steps=1000)
        require_resumable(tmp_path / "nowhere", None, max_train_steps=1000)
        return
    with pytest.raises(ConfigError, match=said):
        require_resumable(checkpoints, resume, max_train_steps=1000)


@pytest.mark.parametrize(("text", "value"), [("200", 200), ("0", 0), ("00000200", 200), ("never", "never")])
def test_the_option_is_a_step_or_never(text: str, value: Resume) -> None:
    assert load_config(["--config", "miniature", "--resume", text]).resume == value
    assert load_config(["--config", "miniature"]).resume is None


@pytest.mark.parametrize("text", ["", "-1", "1.5", "newest", "Never", "\u0664", "9" * 13])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--resume .*: give the step of a checkpoint, such as 200, or never"):
        load_config(["--config", "miniature", f"--resume={text}"])
