"""Train the miniature's UNet for two steps on two ranks; leave run folders, and what their engines hold and predict.

Usage: python export_worker.py OUT MINIATURE. For each case of CASES: OUT/CASE/ (a run folder as train.py leaves it)
and OUT/CASE.pt with {"module": full weights in the engine's dtype, "prediction": of the live engine on unet_inputs}.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from zero_layouts_worker import (
    AUTOCAST,
    FP32_ACCUMULATION,
    WORLD_SIZE,
    Fused,
    convert_to_universal,
    deepspeed_settings,
    launch,
)

from ds_dpo.precision import torch_dtype
from ds_dpo.storage.manifest import Manifest, hash_file, step_folder_name, write_manifest

STEPS = 2
SPLIT_ALL = {"stage3_param_persistence_threshold": 0}
# two images of 8 x 8 and the widest layer of the miniature: many sub-groups of ZeRO-3
SMALL_SUB_GROUPS = {**SPLIT_ALL, "sub_group_size": 20_000}
CASES: dict[str, dict] = {
    "zero0_fp32": {"stage": 0, "precision": "fp32"},
    "zero0_bf16": {"stage": 0, "precision": "bf16"},
    "zero0_fp16_fused": {"stage": 0, "precision": "fp16", "optimizer": Fused},
    "zero1_fp32_frozen": {"stage": 1, "precision": "fp32", "frozen": "up_blocks"},
    "zero1_bf16": {"stage": 1, "precision": "bf16", "top": FP32_ACCUMULATION},
    "zero2_fp32": {"stage": 2, "precision": "fp32"},
    "zero2_fp32_two_groups": {"stage": 2, "precision": "fp32", "num_groups": 2},
    "zero2_bf16_round_robin": {"stage": 2, "precision": "bf16", "zero": {"round_robin_gradients": True}},
    "zero2_fp16": {"stage": 2, "precision": "fp16"},
    "zero2_autocast": {"stage": 2, "precision": "fp32", "top": AUTOCAST},
    "zero3_fp32_frozen": {"stage": 3, "precision": "fp32", "frozen": "down_blocks", "zero": SPLIT_ALL},
    "zero3_fp32_two_groups": {"stage": 3, "precision": "fp32", "num_groups": 2, "zero": SMALL_SUB_GROUPS},
    "zero3_bf16": {"stage": 3, "precision": "bf16", "zero": SPLIT_ALL},
    "zero3_fp16": {"stage": 3, "precision": "fp16", "zero": SMALL_SUB_GROUPS},
    "zero3_autocast": {"stage": 3, "precision": "fp32", "top": AUTOCAST, "zero": SPLIT_ALL},
    "lora_zero2_bf16": {"stage": 2, "precision": "bf16", "lora": {"r": 4, "lora_alpha": 8}},
    "lora_zero3_bf16": {"stage": 3, "precision": "bf16", "lora": {"r": 4, "lora_alpha": 8}},
}
UNIVERSAL = ("zero2_fp32", "zero3_fp32_two_groups")


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
    lora, frozen = description.pop("lora", None), description.pop("frozen", None)
    num_groups = description.pop("num_groups", 1)
    kind = description.pop("optimizer", torch.optim.AdamW)
    precision = description["precision"]
    unet = UNet2DConditionModel.from_pretrained(miniature, subfolder="unet")
    config = dict(unet.config)
    if lora is not None:
        add_lora(unet, lora)
    if frozen is not None:
        unet.get_submodule(frozen).requires_grad_(False)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    groups = [{"params": trained[start::num_groups]} for start in range(num_groups)]
    optimizer = kind(groups, lr=3e-2 if lora else 1e-4)
    engine, *_ = deepspeed.initialize(model=unet, optimizer=optimizer, config=deepspeed_settings(**description))
    for step in range(STEPS):
        inputs = unet_inputs(config, torch_dtype(precision), seed=step * WORLD_SIZE + rank)
        engine.backward(engine(**inputs).sample.float().square().mean())
        engine.step()
    folder = out / case / "checkpoints" / step_folder_name(STEPS)
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    engine.eval()
    with torch.no_grad():
        prediction = engine(**unet_inputs(config, torch_dtype(precision), seed=99)).sample
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
    (folder / "denoiser_config.json").write_text(json.dumps(config))
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
    if rank == 0:
        for case in UNIVERSAL:
            convert_to_universal(out / case / "checkpoints" / step_folder_name(STEPS))


if __name__ == "__main__":
    launch(all_cases)
