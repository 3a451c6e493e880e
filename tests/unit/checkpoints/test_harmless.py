"""No file of a checkpoint runs code, whichever way a run comes back to it."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_run import Run, contents
from payloads import WRITERS, Payload

from ds_dpo.engine.noting_engine import NotingCheckpointEngine
from ds_dpo.errors import CheckpointError
from ds_dpo.storage.state_files import StateFile

FILES = (
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "ema_rank_00000.pt",
    "reference_rank_00000.pt",
    "adapter_config.json",
    "denoiser_config.json",
    "reference.safetensors",
)


def write_plain(state: Any, path: Path) -> None:
    if path.suffix == ".json":
        path.write_text("{}")
    elif path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)


@pytest.fixture
def whole(run: Run) -> Run:
    """A checkpoint with a file of each kind."""
    others = [
        StateFile(name=name, state={"a": torch.ones(1)}, write=write_plain) for name in FILES if "states" not in name
    ]
    others = [file for file in others if file.name != "denoiser_config.json"]
    run.writer().save(step=1, contents=contents(1, *others))
    assert run.loaded() == {"step": 1}
    return run


@pytest.mark.parametrize("layout", ["as first", "another"])
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", FILES)
def test_a_payload_in_any_file_does_not_run_at_a_resume(
    whole: Run, tmp_path: Path, name: str, write: Callable[[object, Path], None], layout: str
) -> None:
    target, folder = tmp_path / "ran", whole.folder / "step_00000001"
    write(Payload(target), folder / name)
    whole.claim(1)
    whole.engine.layout = layout
    with pytest.raises(CheckpointError, match=f"no checkpoint in .* can be used: {folder / name}"):
        whole.store().load_newest()
    assert not target.exists()
    if name.endswith("_states.pt"):
        with contextlib.suppress(RuntimeError):  # torch finds no file of its own after it has run the payload
            whole.engine.read_checkpoint(folder)
        assert target.exists(), "the payload is real"


@pytest.mark.parametrize("name", ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero/weight/fp32.pt"])
def test_a_file_that_the_manifest_does_not_list_is_refused(whole: Run, name: str) -> None:
    path = whole.folder / "step_00000001" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({}, path)
    with pytest.raises(CheckpointError, match=f"{name}: not in the manifest"):
        whole.store().load_newest()


@pytest.mark.parametrize("write", WRITERS)
def test_deepspeed_itself_gets_no_file_unseen(tmp_path: Path, write: Callable[[object, Path], None]) -> None:
    class Original:
        def load(self, path: str, map_location: Any = None) -> Any:
            return torch.load(path, map_location=map_location, weights_only=False)

    target, path = tmp_path / "ran", tmp_path / "mp_rank_00_model_states.pt"
    engine = NotingCheckpointEngine(Original())
    torch.save({"module": torch.ones(1)}, path)
    assert engine.load(str(path), map_location="cpu")["module"].tolist() == [1.0]
    write(Payload(target), path)
    with pytest.raises(CheckpointError, match=str(path)):
        engine.load(str(path))
    assert not target.exists()
