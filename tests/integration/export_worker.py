"""Train the miniature's UNet for two steps on two ranks; leave run folders, and what their engines hold and predict.

Usage: python export_worker.py OUT MINIATURE. For each case of CASES: OUT/CASE/ (a run folder as train.py leaves it)
and OUT/CASE.pt with {"module": full weights in the engine's dtype, "prediction": of the live engine on unet_inputs}.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from zero_layouts_worker import FP32_ACCUMULATION, WORLD_SIZE, deepspeed_settings, launch

from ds_dpo.manifest import Manifest, hash_file, step_folder_name, write_manifest

STEPS = 2
CASES: dict[str, dict] = {
    "zero2_fp32": {"stage": 2, "precision": "fp32"},
    "zero1_bf16": {"stage": 1, "precision": "bf16", "top": FP32_ACCUMULATION},
    "zero3_bf16": {"stage": 3, "precision": "bf16", "zero": {"stage3_param_persistence_threshold": 0}},
    "lora_zero2_bf16": {"stage": 2, "precision": "bf16", "lora": {"r": 4, "lora_alpha": 8}},
    "lora_zero3_bf16": {"stage": 3, "precision": "bf16", "lora": {"r": 4, "lora_alpha": 8}},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def unet_inputs(config: Mapping, dtype: torch.dtype, *, seed: int) -> dict:
    """Random arguments of a forward of an SDXL-shaped UNet: two images, three text tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    pooled_width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {
        "sample": draw(2, config["in_channels"], 8, 8),
        "timestep": torch.tensor([10, 900]),
        "encoder_hidden_states": draw(2, 3, config["cross_attention_dim"]),
        "added_cond_kwargs": {"text_embeds": draw(2, pooled_width), "time_ids": draw(2, 6)},
    }


def train_and_save(rank: int, out: Path, miniature: str, case: str) -> None:
    import deepspeed
    from diffusers import UNet2DConditionModel

    description = {"top": {}, "zero": {}, **CASES[case]}
    lora = description.pop("lora", None)
    precision = description["precision"]
    unet = UNet2DConditionModel.from_pretrained(miniature, subfolder="unet")
    config = dict(unet.config)
    if lora is not None:
        add_lora(unet, lora)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2 if lora else 1e-4)
    engine, *_ = deepspeed.initialize(model=unet, optimizer=optimizer, config=deepspeed_settings(**description))
    for step in range(STEPS):
        inputs = unet_inputs(config, DTYPES[precision], seed=step * WORLD_SIZE + rank)
        engine.backward(engine(**inputs).sample.float().square().mean())
        engine.step()
    folder = out / case / "checkpoints" / step_folder_name(STEPS)
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    engine.eval()
    with torch.no_grad():
        prediction = engine(**unet_inputs(config, DTYPES[precision], seed=99)).sample
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    torch.distributed.barrier()
    if rank == 0:
        torch.save({"module": weights, "prediction": prediction}, out / f"{case}.pt")
        if lora is not None:
            unet.peft_config["default"].save_pretrained(folder)
        finish_run(folder, config, description, miniature)


def add_lora(unet: torch.nn.Module, settings: Mapping) -> None:
    """Freeze the UNet and let peft add an adapter to its attention, as a LoRA run does."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    torch.manual_seed(0)  # the same start on every rank
    unet.add_adapter(LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **settings))


def finish_run(folder: Path, config: Mapping, description: Mapping, miniature: str) -> None:
    (folder / "unet_config.json").write_text(json.dumps(config))
    (folder.parent.parent / "config.yaml").write_text(yaml.safe_dump({"model": {"pretrained": miniature}}))
    files = {path.name: hash_file(path) for path in folder.iterdir()}
    stage, precision = description["stage"], description["precision"]
    write_manifest(
        folder,
        Manifest(step=STEPS, world_size=WORLD_SIZE, stage=stage, precision=precision, fingerprint="", files=files),
    )


def all_cases(rank: int, out: Path, miniature: str) -> None:
    for case in CASES:
        train_and_save(rank, out, miniature, case)


if __name__ == "__main__":
    launch(all_cases)
