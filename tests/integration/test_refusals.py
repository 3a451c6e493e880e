"""What cannot run ends with one clear message, a status that is not 0, and nothing half-written."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from repository import ROOT

pytestmark = pytest.mark.launch
TRAIN = str(ROOT / "ds_dpo" / "train.py")
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
MINIATURE = ["--config", "miniature", "--deepspeed_config", "zero2_fp32_cpu", "--max_train_steps", "2"]


def run(command, cwd, **environment):
    offline = {"HF_HOME": str(cwd / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9", "DS_ACCELERATOR": "cpu"}
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(
        command, env={**os.environ, **offline, **quiet, **environment}, cwd=cwd, capture_output=True, text=True
    )


def refused(done, *said):
    """Check status and message; return the message."""
    everything = done.stdout + done.stderr
    assert done.returncode not in (0, None), everything
    assert "Traceback" not in everything, everything
    messages = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(messages) == 1, everything
    for words in said:
        assert words in done.stderr, everything
    return messages[0]


def train(tmp_path, *options):
    return run([sys.executable, TRAIN, *options], tmp_path)


def test_default_configuration_without_hub_and_gpu(tmp_path):
    refused(train(tmp_path), "hub")
    assert not (tmp_path / "runs").exists()


def test_default_configuration_under_the_launcher(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    refused(run([DEEPSPEED, "--num_accelerators", "1", "--master_port", port, TRAIN], tmp_path), "hub")
    assert not (tmp_path / "runs").exists()


def test_dry_run_needs_neither_launcher_nor_hub_nor_gpu(tmp_path):
    done = train(tmp_path, "--dry_run", "--world_size", "16")
    assert done.returncode == 0, done.stderr
    for said in ("pairs_per_step: 2048", "2048 = 16 ranks x 4 at once x 32 accumulated", '"stage": 1', "beta 5000"):
        assert said in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config", "sdxl_pickapick"], ["sdxl_pickapick", "sdxl_pickapic"]),
        (["--learning_rat", "1e-5"], ["learning_rat", "did you mean learning_rate"]),
        (["--config", "miniature", "--pairs_per_step", "15"], ["15", "8 and 16"]),
        (["--config", "miniature", "--expected_world_size", "16"], ["expected_world_size is 16", "1 rank"]),
        (["--config", "miniature", "--data.dataset", "nowhere/at_all.parquet"], ["nowhere/at_all.parquet"]),
        (["--config", "miniature", "--data.split", "tests"], ["tests", "test_unique"]),
        (["--config", "miniature", "--model.pretrained", "./no_model"], ["no_model"]),
        (["--config", "miniature", "--model.attention", "xformers"], ["xformers"]),
        (["--config", "miniature", "--diffusion.zero_terminal_snr", "true"], ["timestep 999", "max_timestep 998"]),
        (
            [*MINIATURE, "--diffusion.max_timestep", "998", "--diffusion.zero_terminal_snr", "true"],
            ["images are drawn from the last timestep on", "cadence.sample_every_steps to none"],
        ),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_options_that_cannot_run(tmp_path, options, said):
    refused(train(tmp_path, *options), *said)
    assert not (tmp_path / "runs").exists()


def test_auto_where_none_may_stand(tmp_path):
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": "auto"}}')
    done = train(tmp_path, "--config", "miniature", "--deepspeed_config", "mine.json")
    refused(done, "zero_optimization.stage must have a value")


def test_missing_column(tmp_path):
    Dataset.from_dict({"caption": ["a"], "jpg_0": [b""], "jpg_1": [b""]}).to_parquet(tmp_path / "pairs.parquet")
    done = train(tmp_path, *MINIATURE, "--data.dataset", "pairs.parquet")
    refused(done, "label_0", "caption, jpg_0, jpg_1")


def test_run_folder_of_another_identity(tmp_path):
    done = train(tmp_path, *MINIATURE)
    assert done.returncode == 0, done.stderr
    before = (tmp_path / "runs" / "miniature" / "config.yaml").read_text()
    refused(train(tmp_path, *MINIATURE, "--beta", "2000"), "objective.beta: 500.0 -> 2000.0")
    assert (tmp_path / "runs" / "miniature" / "config.yaml").read_text() == before


def test_no_space(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        refused(train(tmp_path, *MINIATURE, "--output_dir", "small/run"), "no space for a checkpoint", "small/run")
    finally:
        subprocess.run(["umount", str(small)], check=True)
