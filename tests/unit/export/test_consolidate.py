"""A checkpoint becomes what was asked for, whole, or nothing is there."""

import itertools
import json
import shutil

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from unet_shapes import TINY_SDXL, tiny_unet
from zero_checkpoint import save_run, save_zero2

from ds_dpo.commands.consolidate import parse_arguments
from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.errors import CheckpointError, DsDpoError, ModelError
from ds_dpo.export import formats
from ds_dpo.export.consolidate import consolidate
from ds_dpo.export.lora.file import NAMINGS
from ds_dpo.export.request import FORMAT_OPTIONS, LORA_NAMINGS, Request

FORMATS = {
    "denoiser": {},
    "pipeline": {},
    "single-file": {},
    "lora": {"rank": 2},
}
SHARD = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The miniature with a tiny UNet in place of its own; no test draws with it."""
    folder = tmp_path_factory.mktemp("pipeline") / "base"
    ignored = shutil.ignore_patterns("unet")
    shutil.copytree(resolve_asset("ds_dpo://assets/miniature/model"), folder, ignore=ignored)
    tiny_unet(TINY_SDXL, seed=0).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def base(pipeline):
    return UNet2DConditionModel.from_pretrained(str(pipeline), subfolder="unet")


@pytest.fixture(scope="module")
def tuned(base):
    generator = torch.Generator().manual_seed(1)
    return {
        name: weight + 0.01 * torch.randn(weight.shape, generator=generator)
        for name, weight in base.state_dict().items()
    }


@pytest.fixture
def run(tmp_path, pipeline, base, tuned):
    """A run of that pipeline; tmp_path / "outs" is for what is exported."""
    (tmp_path / "outs").mkdir()
    save_run(tmp_path / "run", tuned, base=pipeline, config=base.config)
    return tmp_path / "run"


def export(run, out, **options):
    said = []
    consolidate(Request(source=run, out=out, **options), say=said.append)
    return "\n".join(said)


# ---- damage ----


def flip_a_bit(folder):
    path = folder / SHARD.format(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(folder):
    first, second = folder / SHARD.format(0), folder / SHARD.format(1)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


DAMAGES = {
    "truncated": (
        lambda folder: (folder / SHARD.format(1)).write_bytes((folder / SHARD.format(1)).read_bytes()[:-9]),
        1,
    ),
    "missing": (lambda folder: (folder / SHARD.format(1)).unlink(), 1),
    "swapped": (swap, 0),
    "extra": (lambda folder: shutil.copy(folder / SHARD.format(1), folder / SHARD.format(2)), 2),
    "wrong-rank": (lambda folder: shutil.copy(folder / SHARD.format(0), folder / SHARD.format(1)), 1),
    "bit-flipped": (flip_a_bit, 1),
}


@pytest.mark.parametrize("has_manifest", [True, False], ids=["manifest", "foreign"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_checkpoint_leaves_nothing(run, tmp_path, pipeline, form, damage, has_manifest):
    folder = run / "checkpoints" / "step_00000007"
    do, rank = DAMAGES[damage]
    if not has_manifest:
        folder = folder.rename(tmp_path / "global_step7")
        (folder / "manifest.json").unlink()
    do(folder)
    with pytest.raises(CheckpointError, match=SHARD.format(rank)):
        export(
            run if has_manifest else folder, tmp_path / "outs" / "out", format=form, base=str(pipeline), **FORMATS[form]
        )
    assert list((tmp_path / "outs").iterdir()) == []


@pytest.mark.parametrize("name", ["conv_out.bias", "mid_block.resnets.0.conv1.weight"])
@pytest.mark.parametrize("form", FORMATS)
def test_values_that_are_not_numbers_leave_nothing(tmp_path, pipeline, base, tuned, form, name):
    bad = {**tuned, name: tuned[name].clone()}
    bad[name].view(-1)[3] = torch.nan
    folder = save_zero2(tmp_path / "tag", bad, config=base.config)
    (tmp_path / "outs").mkdir()
    # without a base the values are first met while the file is written
    bases = [str(pipeline)] if form in ("pipeline", "lora") else [str(pipeline), None]
    names = ["out", "out.safetensors"] if form in ("single-file", "lora") else ["out"]
    for known, out in itertools.product(bases, names):
        with pytest.raises(CheckpointError, match="NaN"):
            export(folder, tmp_path / "outs" / out, format=form, base=known, **FORMATS[form])
        assert list((tmp_path / "outs").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_nothing_foreign_is_replaced(run, tmp_path, form):
    out = tmp_path / "outs" / "out"
    said = export(run, out, format=form, **FORMATS[form])
    assert f"saved to {out}" in said
    export(run, out, format=form, dtype="bf16", **FORMATS[form])  # an earlier export is
    (out / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"'mine.txt' was added"):
        export(run, out, format=form, **FORMATS[form])
    assert sorted(path.name for path in (tmp_path / "outs").iterdir()) == ["out"]


@pytest.mark.parametrize("form", ["single-file", "lora"])
def test_a_file_alone(run, tmp_path, form):
    out = tmp_path / "outs" / "mine.safetensors"
    export(run, out, format=form, **FORMATS[form])
    export(run, out, format=form, **FORMATS[form])
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["modelspec.title"] == "mine"
        assert json.loads(file.metadata()["ds_dpo.export"])["step"] == 7
    save_file({"precious": torch.ones(1)}, out)
    with pytest.raises(CheckpointError, match=r"mine.safetensors: exists and is not an earlier export"):
        export(run, out, format=form, **FORMATS[form])
    assert load_file(out).keys() == {"precious"}


# ---- options ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vae": "x"}, "--vae x: --format denoiser ignores it; give it with pipeline"),
        (
            {"format": "lora", "rank": 4, "variant": "fp16"},
            "--variant fp16: --format lora .* with denoiser or pipeline",
        ),
        ({"format": "pipeline", "rank": 4}, "--rank 4: --format pipeline .* with lora"),
        ({"format": "single-file", "max_shard_gb": 1.0}, r"--max_shard_gb 1.0: --format single-file"),
        ({"lora_naming": "kohya"}, "--lora_naming kohya: --format denoiser"),
        ({"out": "x.safetensors"}, "--format denoiser writes a folder"),
        ({"out": "x.safetensors", "format": "single-file", "push_to_hub": "me/x"}, "give a folder"),
        ({"private": True}, "no effect without an upload"),
        ({"variant": "../x"}, "must be a word such as fp16"),
        ({"format": "lora", "rank": 0}, "--rank 0 must be above 0"),
        ({"format": "lora"}, "holds a fully trained model and no LoRA; add --rank"),
        ({"lora_alpha": 8.0}, "--lora_alpha 8: .* has no LoRA"),
        ({"ema": True}, "has no EMA weights"),
        ({"keys": "unet"}, r"no parameter under 'unet\.'; its names begin with add_embedding, conv_in"),
        ({"base": "/nowhere/sdxl", "format": "lora", "rank": 4}, "'/nowhere/sdxl'"),
    ],
)
def test_what_cannot_be_done_is_said(run, tmp_path, options, said):
    out = tmp_path / "outs" / options.pop("out", "out")
    with pytest.raises(DsDpoError, match=said):
        export(run, out, **options)
    assert list((tmp_path / "outs").iterdir()) == []


def test_every_option_belongs_to_a_format():
    known = set(Request.__dataclass_fields__)
    assert set().union(*FORMAT_OPTIONS.values()) == known


def test_each_value_that_may_be_asked_for_can_be_written():
    """The command line lists them without torch; what writes them is in modules that need it."""
    assert list(FORMAT_OPTIONS) == list(formats.FORMATS)
    assert list(LORA_NAMINGS) == list(NAMINGS) == list(formats.METADATA_OF_NAMING)


# ---- what comes out ----


@pytest.mark.parametrize(("given", "meant"), [("unet", "denoiser"), ("denoiser", "denoiser"), ("lora", "lora")])
def test_a_format_may_be_given_by_its_first_name(given, meant):
    assert parse_arguments(["runs/mine", "out", "--format", given]).format == meant


def test_variant_in_shards(run, tmp_path, tuned):
    out = tmp_path / "outs" / "out"
    num_bytes = sum(2 * weight.numel() for weight in tuned.values())
    said = export(run, out, variant="fp16", max_shard_gb=num_bytes / 2.5 / 1e9)
    index = json.loads((out / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert 'variant="fp16"' in said
    unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet", variant="fp16", torch_dtype=torch.float16)
    assert all(torch.equal(weight, tuned[name].half()) for name, weight in unet.state_dict().items())
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors"):
        UNet2DConditionModel.from_pretrained(out, subfolder="unet", use_safetensors=True)


def test_pipeline_with_a_variant_and_another_vae(run, tmp_path, pipeline, tuned):
    out, vae = tmp_path / "outs" / "out", shutil.copytree(pipeline, tmp_path / "other") / "vae"
    weights = vae / "diffusion_pytorch_model.safetensors"
    marked = {name: weight + 1 for name, weight in load_file(weights).items()}
    save_file(marked, weights)
    export(run, out, format="pipeline", variant="fp16", vae=str(vae))
    found = DiffusionPipeline.from_pretrained(out, variant="fp16", torch_dtype=torch.float16)
    assert all(torch.equal(weight, tuned[name].half()) for name, weight in found.unet.state_dict().items())
    assert all(torch.equal(weight, marked[name].half()) for name, weight in found.vae.state_dict().items())


def test_pipeline_samples_as_its_model_was_trained(run, tmp_path, pipeline):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["prediction_type"] = "v_prediction"
    config["diffusion"] = {"zero_terminal_snr": True}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    export(run, tmp_path / "outs" / "trained", format="pipeline")
    export(run, tmp_path / "outs" / "plain", format="pipeline", base=str(pipeline))
    own = DDIMScheduler.from_pretrained(pipeline, subfolder="scheduler")
    trained = DDIMScheduler.from_pretrained(tmp_path / "outs" / "trained", subfolder="scheduler")
    trained.set_timesteps(4)
    assert (trained.timesteps[0], trained.alphas_cumprod[-1]) == (999, 0)
    assert trained.config["prediction_type"] == "v_prediction"
    changed = {name for name, value in own.config.items() if trained.config.get(name) != value}
    assert changed == {"prediction_type", "rescale_betas_zero_snr", "timestep_spacing"}
    plain = DDIMScheduler.from_pretrained(tmp_path / "outs" / "plain", subfolder="scheduler")
    assert plain.config == own.config, "a base that the user names is taken as it is"


def test_keys_take_the_unet_out_of_more(tmp_path, base, tuned):
    prefixed = {f"unet.{name}": weight for name, weight in tuned.items()}
    more = {"text_encoder.weight": torch.ones(3), **prefixed, "unetlike.weight": torch.ones(2)}
    folder = save_zero2(tmp_path / "tag", more, config=base.config)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="not the weights of this configuration"):
        export(folder, out)
    assert f"took {len(tuned)} parameters under 'unet', skipped 2 others" in export(
        folder, out, keys="unet", dtype="fp32"
    )
    found = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == tuned.keys()
    assert all(torch.equal(found[name], weight) for name, weight in tuned.items())


def test_a_checkpoint_of_an_earlier_version_has_its_configuration_under_the_first_name(tmp_path, base, tuned):
    folder = save_zero2(tmp_path / "global_step7", tuned, config=base.config)
    (folder / "denoiser_config.json").rename(folder / "unet_config.json")
    export(folder, tmp_path / "out", dtype="fp32")
    written = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert written["block_out_channels"] == list(base.config["block_out_channels"])


def test_averages_instead(tmp_path, base, tuned):
    averages = {name: weight / 2 for name, weight in tuned.items()}
    folder = save_zero2(tmp_path / "tag", tuned, config=base.config, ema=averages)
    for ema, expected in ((True, averages), (False, tuned)):
        export(folder, tmp_path / "out", ema=ema, dtype="fp32")
        found = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
        assert ("EMA" in (tmp_path / "out" / "README.md").read_text()) == ema


def test_single_file_in_a_folder_with_a_card(run, tmp_path, base, tuned):
    out = tmp_path / "outs" / "mine"
    export(run, out, format="single-file", dtype="fp32")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "export.json", "mine.safetensors"]
    back = convert_ldm_unet_checkpoint(load_file(out / "mine.safetensors"), base.config)
    assert all(torch.equal(back[name], weight) for name, weight in tuned.items())


def test_the_wrong_base_is_named_and_an_absent_one_is_said(run, tmp_path):
    other = tmp_path / "other"
    UNet2DConditionModel.from_config({**TINY_SDXL, "layers_per_block": 1}).save_pretrained(other / "unet")
    with pytest.raises(ModelError, match=r"the base's UNet is not that of this run: .*give the right base with --base"):
        export(run, tmp_path / "outs" / "out", base=str(other))
    assert list((tmp_path / "outs").iterdir()) == []
    said = export(run, tmp_path / "outs" / "out", base="/gone/sdxl")
    assert "not measured, because the weights of /gone/sdxl are not available" in said


def test_a_run_that_trained_nothing_is_said(tmp_path, pipeline, base):
    save_run(tmp_path / "run", base.state_dict(), base=pipeline, config=base.config)
    assert "WARNING: this run trained nothing" in export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no layer differs from the base"):
        export(tmp_path / "run", tmp_path / "lora", format="lora", rank=4)
    assert not (tmp_path / "lora").exists()


def test_the_card_is_in_every_folder(run, tmp_path):
    for form, options in FORMATS.items():
        export(run, tmp_path / "outs" / form, format=form, license="mit", **options)
        card = (tmp_path / "outs" / form / "README.md").read_text()
        assert "license: mit" in card
        assert str(tmp_path) not in card


def test_a_finished_export_is_pushed(run, tmp_path, monkeypatch):
    pushed = []

    def push(folder, repo_id, *, private, say):
        pushed.append((repo_id, private, sorted(path.name for path in folder.iterdir())))

    monkeypatch.setattr("ds_dpo.export.consolidate.push_folder", push)
    export(run, tmp_path / "outs" / "out", format="lora", rank=2, push_to_hub="me/mine", private=True)
    assert pushed == [("me/mine", True, ["README.md", "export.json", "pytorch_lora_weights.safetensors"])]
    assert "me/mine" in (tmp_path / "outs" / "out" / "README.md").read_text()
