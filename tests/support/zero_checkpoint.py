"""A checkpoint as DeepSpeed's ZeRO 2 saves it, of any weights, without training."""

import json

import torch
import yaml

from ds_dpo.storage.manifest import Manifest, hash_file, write_manifest


def save_zero2(folder, weights, *, world_size=2, frozen=None, config=None, steps=7, ema=None):
    """weights: the fp32 masters; frozen: weights that were not trained, as the module holds them; ema: averages."""
    folder.mkdir(parents=True)
    frozen = frozen or {}
    flat = flatten(weights, world_size)
    model = {
        "module": {name: weight.bfloat16() for name, weight in weights.items()} | frozen,
        "buffer_names": [],
        "param_shapes": [{name: weight.shape for name, weight in weights.items()}],
        "frozen_param_shapes": {name: weight.shape for name, weight in frozen.items()},
        "shared_params": {},
        "global_steps": steps,
        "dp_world_size": world_size,
        "ds_config": {},
    }
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    for rank, part in enumerate(flat.chunk(world_size)):
        inner = {
            "zero_stage": 2,
            "partition_count": [world_size],
            "single_partition_of_fp32_groups": [part.clone()],
            "base_optimizer_state": {"state": {}, "param_groups": []},
        }
        torch.save({"optimizer_state_dict": inner}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    if ema is not None:
        for rank, part in enumerate(flatten(ema, world_size).chunk(world_size)):
            torch.save({"format": 1, "flat_groups": [part.clone()]}, folder / f"ema_rank_{rank:05d}.pt")
    if config is not None:
        (folder / "denoiser_config.json").write_text(json.dumps(dict(config)))
    return folder


def flatten(weights, world_size):
    flat = torch.cat([weight.reshape(-1) for weight in weights.values()])
    return torch.cat([flat, torch.zeros(-len(flat) % (2 * world_size))])


def save_run(run, weights, *, base, steps=7, **settings):
    """A run folder as train.py leaves it, with one checkpoint, which is returned; base: the pipeline that it names."""
    folder = save_zero2(run / "checkpoints" / f"step_{steps:08d}", weights, steps=steps, **settings)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"pretrained": str(base)}}))
    files = {path.name: hash_file(path) for path in folder.iterdir()}
    write_manifest(folder, Manifest(step=steps, world_size=2, stage=2, precision="bf16", fingerprint="", files=files))
    return folder
