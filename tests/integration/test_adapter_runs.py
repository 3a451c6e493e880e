"""Adapters and frozen parts in real runs: alike under every ZeRO stage, resumed to the bit, exported as they are."""

import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from export_worker import unet_inputs
from launching import curve, launch, metrics, zero_stage

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.load import load_config
from ds_dpo.engine.settings_file import DS_CONFIGS
from ds_dpo.export.consolidate import consolidate
from ds_dpo.export.request import Request
from ds_dpo.models.loading import file_weights
from ds_dpo.zero_shards.reader import open_checkpoint

pytestmark = pytest.mark.launch
MINIATURE = resolve_asset("ds_dpo://assets/miniature/model")
STEPS = 10
STAGES = (2, 3)  # stage 1 with an adapter: test_invariance.py
SETTINGS = {
    "config": "miniature",
    "pairs_per_step": 4,
    "micro_batch_pairs": 2,
    "max_train_steps": STEPS,
    "learning_rate": 2e-3,
    "warmup_steps": 2,
    "schedule.decay_steps": 20,
    "cadence.save_every_steps": 5,
    "cadence.sample_every_steps": "none",
    "model.gradient_checkpointing": "true",
}
LORA = {"adapter.type": "lora", "adapter.rank": 4}
RSLORA = {"adapter.type": "rslora", "adapter.rank": 4, "adapter.alpha": 6, "adapter.dropout": 0.2, "ema.decay": 0.5}
DORA = {"adapter.type": "dora", "adapter.rank": 4, "adapter.targets": "to_q to_v conv1"}
PARTS = {"model.train": "*attn* conv_in.*", "model.freeze": "*.to_v.* *.bias", "max_train_steps": 2}


def case(out, name, stage, *, precision="fp32_cpu", **settings):
    settings = {**SETTINGS, "output_dir": out / name, **settings}
    settings["deepspeed_config"] = f"zero{stage}_{precision}"
    if stage == 3:  # nothing is small enough to stay whole
        settings["deepspeed_config"] = out / f"zero3_{precision}.json"
    arguments = []
    for field, value in settings.items():
        is_list = field in ("adapter.targets", "model.train", "model.freeze")
        arguments += [f"--{field}", *value.split()] if is_list else [f"--{field}={value}"]
    return arguments


def write_whole_sharding(out, precision):
    settings = json.loads((DS_CONFIGS / f"zero3_{precision}.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (out / f"zero3_{precision}.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    for precision in ("fp32_cpu", "bf16"):
        write_whole_sharding(out, precision)
    two_ranks = [case(out, f"lora_{stage}", stage, **LORA) for stage in STAGES]
    two_ranks.append(case(out, "dora_3", 3, **DORA))
    two_ranks.append(case(out, "rslora_2", 2, **RSLORA))
    for steps in (5, STEPS):
        two_ranks.append(case(out, "lora_3_resumed", 3, **{**LORA, "max_train_steps": steps}))
        two_ranks.append(case(out, "rslora_2_resumed", 2, **{**RSLORA, "max_train_steps": steps}))
    two_ranks += [case(out, f"parts_{stage}", stage, precision="bf16", **PARTS) for stage in STAGES]
    one_rank = [case(out, "lora_1_rank", 2, **{**LORA, "micro_batch_pairs": 1}), case(out, "dora_1_rank", 2, **DORA)]
    for cases, ranks in ((two_ranks, 2), (one_rank, 1)):
        launch(sorted(cases, key=zero_stage), out, ranks=ranks, program="adapter_cases.py")
    return out


def newest(run):
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


@pytest.mark.parametrize(
    ("name", "other"), [*((f"lora_{stage}", "lora_1_rank") for stage in STAGES), ("dora_3", "dora_1_rank")]
)
def test_curve_is_the_same_for_any_stage_and_ranks(runs, name, other):
    for quantity in ("loss", "policy_chosen_error", "policy_rejected_error"):
        assert curve(runs / name, quantity) == pytest.approx(curve(runs / other, quantity), abs=1e-4)
    losses = curve(runs / name)
    assert losses[0] == pytest.approx(0.69314718, abs=1e-7)
    assert max(losses) - min(losses) > 0.005, "a curve that does not move compares nothing"


@pytest.mark.parametrize("name", ["lora_3", "rslora_2"])
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(runs, name):
    resumed, whole = runs / f"{name}_resumed", runs / name
    for quantity in ("loss", "gradient_norm", "policy_chosen_error", "learning_rate"):
        assert curve(resumed, quantity) == curve(whole, quantity)
    saved = [open_checkpoint(newest(run)) for run in (resumed, whole)]
    assert len(saved[0].parameters) > 0
    quantities = ["fp32", *(["ema"] if name.startswith("rslora") else [])]
    for parameter in saved[0].parameters:
        for quantity in quantities:
            assert torch.equal(*(checkpoint.read(parameter, quantity) for checkpoint in saved)), parameter


@pytest.mark.parametrize("name", [*(f"lora_{stage}" for stage in STAGES), "dora_3", "rslora_2"])
def test_checkpoint_holds_the_adapter_alone(runs, name):
    checkpoint = open_checkpoint(newest(runs / name))
    assert checkpoint.parameters
    assert all(".lora_" in parameter for parameter in checkpoint.parameters)
    assert (checkpoint.folder / "adapter_config.json").is_file()
    num_bytes = sum(path.stat().st_size for path in checkpoint.folder.glob("*.pt"))
    elements = sum(placement.numel for placement in checkpoint.parameters.values())
    assert num_bytes < 24 * elements + 400_000  # master, moments, average, weights, names


@pytest.mark.parametrize("name", ["lora_3", "dora_3", "rslora_2"])
def test_exports_predict_as_the_live_policy(runs, tmp_path, name):
    consolidate(Request(source=runs / name, out=tmp_path / "lora", format="lora", dtype="fp32"), say=lambda line: None)
    consolidate(Request(source=runs / name, out=tmp_path / "unet", dtype="fp32"), say=lambda line: None)
    pipeline = StableDiffusionXLPipeline.from_pretrained(MINIATURE)
    pipeline.unet.eval()
    inputs = unet_inputs(pipeline.unet.config, torch.float32, seed=0)
    live = torch.load(runs / name / "live.pt")
    with torch.no_grad():
        base = pipeline.unet(**inputs).sample
        pipeline.load_lora_weights(tmp_path / "lora")
        loaded = pipeline.unet(**inputs).sample
        merged = UNet2DConditionModel.from_pretrained(tmp_path / "unet", subfolder="unet").eval()(**inputs).sample
    moved = (live["on"] - base).abs().max()
    assert moved > 1e-3
    assert (live["off"] - base).abs().max() < 1e-5  # ZeRO-3 has a linear of its own
    assert (loaded - live["on"]).abs().max() < min(1e-5, moved / 50)
    assert (merged - live["on"]).abs().max() < min(1e-5, moved / 50)


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_scale_of_rslora_is_in_the_file(runs, tmp_path, naming):
    file = tmp_path / "lora.safetensors"
    request = Request(source=runs / "rslora_2", out=file, format="lora", dtype="fp32", lora_naming=naming)
    consolidate(request, say=lambda line: None)
    pipeline = StableDiffusionXLPipeline.from_pretrained(MINIATURE)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    scales = {layer.scaling[key] for layer in pipeline.unet.modules() for key in getattr(layer, "scaling", {})}
    assert scales == {3.0}  # 6 / sqrt(4)


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parts_stay_the_files_to_the_bit(runs, tmp_path, stage):
    run = runs / f"parts_{stage}"
    consolidate(Request(source=run, out=tmp_path / "out", dtype="fp32"), say=lambda line: None)
    found = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet").state_dict()
    file = file_weights(load_config(["--config", "miniature"]).config.model)

    def is_trained(name):
        chosen = "attn" in name or name.startswith("conv_in.")
        return chosen and ".to_v." not in name and not name.endswith(".bias")

    trained = {name for name in file if is_trained(name)}
    assert {name for name in file if not torch.equal(found[name], file[name].float())} == trained
    checkpoint = open_checkpoint(newest(run))
    assert {name for name, placement in checkpoint.parameters.items() if not placement.is_frozen} == trained
    counts = [sum(file[name].numel() for name in names) / 1e6 for names in (trained, file)]
    assert "trains {:.3g} M of {:.3g} M parameters".format(*counts) in (run / "log.txt").read_text()
    assert [line["step"] for line in metrics(run)] == [1, 2]
