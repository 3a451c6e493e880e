"""A run's shards become what diffusers loads, and that is what the live engine held."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from export_worker import CASES, UNIVERSAL, unet_inputs
from safetensors.torch import load_file

import ds_dpo
from ds_dpo.export.consolidate import consolidate as consolidate_here
from ds_dpo.export.request import Request
from ds_dpo.precision import torch_dtype

pytestmark = pytest.mark.launch
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MINIATURE = Path(ds_dpo.__file__).parent / "assets" / "miniature" / "model"
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One launch for all cases."""
    out = tmp_path_factory.mktemp("runs")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = forked.run([str(HERE / "export_worker.py"), str(out), str(MINIATURE)], env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def consolidate(*arguments, cwd):
    """Run the program as a user does, from anywhere, with the package not on the path."""
    command = [sys.executable, str(ROOT / "scripts" / "consolidate.py"), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, cwd=cwd, capture_output=True, text=True)


FULL = [case for case in CASES if "lora" not in CASES[case]]
LORA = [case for case in CASES if "lora" in CASES[case]]


@pytest.mark.parametrize("case", FULL)
def test_unet_is_that_of_the_engine(runs, tmp_path, case):
    stage, precision = CASES[case]["stage"], CASES[case]["precision"]
    said: list[str] = []
    consolidate_here(Request(source=runs / case, out=tmp_path / "out", dtype=precision), say=said.append)
    for words in (f"step 2, ZeRO stage {stage}, 2 ranks", "manifest verified", 'subfolder="unet"'):
        assert words in "\n".join(said)
    unet = load_denoiser(tmp_path / "out", torch_dtype(precision))
    require_weights_and_prediction(unet, runs / f"{case}.pt", case)
    base = load_denoiser(MINIATURE, torch_dtype(precision)).state_dict()
    is_moved = {name: not torch.equal(weight, base[name]) for name, weight in unet.state_dict().items()}
    assert any(is_moved.values())
    if "frozen" in CASES[case]:
        assert not any(moved for name, moved in is_moved.items() if name.startswith(CASES[case]["frozen"]))


@pytest.mark.parametrize("case", UNIVERSAL)
def test_unet_of_a_universal_checkpoint_is_that_of_the_engine(runs, tmp_path, case):
    folder = runs / case / "checkpoints" / "step_00000002_universal"
    base = str(MINIATURE)
    consolidate_here(Request(source=folder, out=tmp_path / "out", dtype="fp32", base=base), say=lambda line: None)
    require_weights_and_prediction(load_denoiser(tmp_path / "out", torch.float32), runs / f"{case}.pt", case)


def load_denoiser(folder, dtype):
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype).eval()


def require_weights_and_prediction(unet, live, case):
    """Every weight to the bit; the forward as exactly as the engine's own arithmetic allows."""
    live, weights = torch.load(live), unet.state_dict()
    assert weights.keys() == live["module"].keys()
    precision = "bf16" if "autocast" in case else CASES[case]["precision"]
    for name, weight in live["module"].items():
        held = [weights[name]]
        if case == "zero3_autocast":  # gathers those of matrix products as they were rounded to compute with
            held.append(weights[name].bfloat16().to(weight.dtype))
        assert any(torch.equal(tensor, weight) for tensor in held), name
    context = torch.autocast("cpu", torch.bfloat16) if "autocast" in case else contextlib.nullcontext()
    with torch.no_grad(), context:
        prediction = unet(**unet_inputs(unet.config, torch_dtype(CASES[case]["precision"]), seed=99)).sample
    # ZeRO-3 replaces torch's linear by one that rounds before it adds the bias: a 16-bit step or two
    step = {"fp32": 0, "bf16": 2**-7, "fp16": 2**-10}[precision] if CASES[case]["stage"] == 3 else 0
    assert (prediction - live["prediction"]).abs().max() <= max(1e-6, step * prediction.abs().max())


def test_pipeline_is_the_base_with_another_unet(runs, tmp_path):
    done = consolidate(runs / "zero3_bf16", tmp_path / "out", "--format", "pipeline", "--dtype", "fp32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tuned = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    base = StableDiffusionXLPipeline.from_pretrained(MINIATURE)
    for component in ("vae", "text_encoder", "text_encoder_2"):
        found, expected = (getattr(pipeline, component).state_dict() for pipeline in (tuned, base))
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    live = torch.load(runs / "zero3_bf16.pt")["module"]
    assert all(torch.equal(tuned.unet.state_dict()[name].bfloat16(), weight) for name, weight in live.items())


def distance(first, second):
    return float((first - second).float().square().mean().sqrt())


@pytest.mark.parametrize("case", LORA)
def test_lora_run_gives_its_lora_and_the_merged_unet(runs, tmp_path, case):
    live = torch.load(runs / f"{case}.pt")
    adapter = {name: weight for name, weight in live["module"].items() if ".lora_" in name}
    for options in (["lora", "--format", "lora"], ["unet"]):
        done = consolidate(runs / case, tmp_path / options[0], *options[1:], "--dtype", "bf16", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"has a LoRA on {len(adapter) // 2} layers" in done.stdout
        assert "trained nothing" not in done.stdout
    found = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert found.keys() == {f"unet.{name.replace('.default.', '.')}" for name in adapter}
    assert all(torch.equal(found[f"unet.{name.replace('.default.', '.')}"], weight) for name, weight in adapter.items())
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet", subfolder="unet", torch_dtype=torch.bfloat16).eval()
    base = UNet2DConditionModel.from_pretrained(MINIATURE, subfolder="unet", torch_dtype=torch.bfloat16).eval()
    inputs = unet_inputs(unet.config, torch.bfloat16, seed=99)
    with torch.no_grad():
        merged, untuned = unet(**inputs).sample, base(**inputs).sample
        base.load_lora_adapter(tmp_path / "lora", prefix="unet", weight_name="pytorch_lora_weights.safetensors")
        loaded = base(**inputs).sample
    # peft loads adapters in fp32, and one in the layer rounds elsewhere than one beside it; training did far more
    moved = distance(untuned, live["prediction"])
    assert distance(loaded, live["prediction"]) < moved / 10
    assert distance(merged, live["prediction"]) < moved / 10


def test_single_file_and_lora_of_a_real_run(runs, tmp_path):
    live = torch.load(runs / "zero3_bf16.pt")["module"]
    config = json.loads((MINIATURE / "unet" / "config.json").read_text())
    single = tmp_path / "tuned.safetensors"
    done = consolidate(runs / "zero3_bf16", single, "--format", "single-file", "--dtype=bf16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    back = convert_ldm_unet_checkpoint(load_file(single), config)
    assert back.keys() == live.keys()
    assert all(torch.equal(back[name], weight) for name, weight in live.items())
    options = ("--format", "lora", "--rank", "8", "--lora-naming", "kohya")
    done = consolidate(runs / "zero3_bf16", tmp_path / "lora.safetensors", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in ("distance from the base: ", "energy kept at rank 8: ", "127 biases and norms hold "):
        assert said in done.stdout
    refused = consolidate(runs / "zero3_bf16", tmp_path / "x", "--rank", "8", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--rank 8: --format denoiser ignores it; give it with lora" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors", "tuned.safetensors"]


def test_deepspeed_is_not_needed(runs, tmp_path):
    script = ROOT / "scripts" / "consolidate.py"
    (tmp_path / "deepspeed.py").write_text("raise ImportError('imported')")
    command = [sys.executable, str(script), str(runs / "zero3_bf16"), str(tmp_path / "out")]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "export.json").read_text())["dtype"] == "fp16"


def test_a_damaged_shard_leaves_nothing(runs, tmp_path):
    folder = runs / "zero1_bf16" / "checkpoints" / "step_00000002"
    shard = folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    try:
        done = consolidate(runs / "zero1_bf16", tmp_path / "out", cwd=tmp_path)
    finally:
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    assert done.returncode == 2
    assert shard.name in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
