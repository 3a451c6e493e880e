"""What ComfyUI, Forge, A1111 and kohya's sd-scripts make of an exported file, and what to do where they miss a part.

Source: ComfyUI, comfy/supported_models.py, comfy/sd.py (load_diffusion_model_state_dict) and comfy/lora.py; kohya's
sd-scripts, networks/lora.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ds_dpo.models.families.family import Family
from ds_dpo.models.families.flux1 import FLUX_TRANSFORMER
from ds_dpo.models.families.sd3 import SD3_TRANSFORMER

CHECKPOINT_PLACES = (
    "ComfyUI: models/checkpoints (A1111, Forge: models/Stable-diffusion; kohya: --pretrained_model_name_or_path)"
)
DENOISER_PLACES = "ComfyUI: models/diffusion_models, node Load Diffusion Model"
# Source: ComfyUI, comfy/lora.py (model_lora_keys_unet)
TRANSFORMER_LORA_PLACES = "ComfyUI: models/loras"
KOHYA_LORA_PLACES = "ComfyUI: models/loras; A1111, Forge: models/Lora; kohya: --network_weights"
DIFFUSERS_LORA_NOTE = (
    "ComfyUI, Forge and A1111 know only a part of these names, and not their alpha; for them export once more with "
    "--lora_naming kohya"
)
COMFY_SAMPLING = {"epsilon": "eps", "v_prediction": "v_prediction"}
# modules that kohya's sd-scripts has no LoRA for: they are outside of the blocks that it searches
UNKNOWN_TO_KOHYA = ("conv_in", "conv_out", "time_embedding", "add_embedding")

BLOCKS_OF_TRANSFORMERS = (SD3_TRANSFORMER.own_beginning, FLUX_TRANSFORMER.own_beginning)


def sampling_remarks(scheduler: Mapping[str, Any] | None, family: Family | None, *, is_whole: bool) -> list[str]:
    """Return what a user of ComfyUI must add, if it takes a single file for another kind of model than it is.

    scheduler: the configuration that the model was trained with; None if it is not known. is_whole: the file has the
    base's text encoders and VAE too; ComfyUI ignores the flags of a denoiser alone under its usual names.
    """
    if scheduler is None:
        return [
            "the base's scheduler is not at hand, so nothing says what the model predicts; if it does not predict the "
            "noise, add ModelSamplingDiscrete (v_prediction, and zsnr if it was trained with zero terminal SNR) behind "
            "the node of ComfyUI that loads the file"
        ]
    predicts = scheduler.get("prediction_type") or "epsilon"
    is_zero_snr = bool(scheduler.get("rescale_betas_zero_snr"))
    if (predicts, is_zero_snr) == _as_comfy_takes(predicts, is_zero_snr, family, is_whole=is_whole):
        return []
    settings = [COMFY_SAMPLING.get(predicts, predicts)] + (["zsnr"] if is_zero_snr else [])
    what = "the file" if is_whole else "a denoiser alone"
    return [
        f"ComfyUI does not see in {what} how the model was trained: add ModelSamplingDiscrete ({', '.join(settings)}) "
        "behind the node that loads it"
    ]


def _as_comfy_takes(predicts: str, is_zero_snr: bool, family: Family | None, *, is_whole: bool) -> tuple[str, bool]:
    if family is None:
        return "epsilon", False
    published = family.published
    if published.reads_flags:
        is_v = is_whole and predicts == "v_prediction"
        return ("v_prediction", is_zero_snr) if is_v else ("epsilon", False)
    return published.prediction_taken or predicts, False


def is_known_to_kohya(module: str) -> bool:
    """Return whether kohya's sd-scripts applies a LoRA to a module of the UNet, by diffusers' name."""
    return module.partition(".")[0] not in UNKNOWN_TO_KOHYA


def kohya_remarks(modules: Iterable[str], *, share: float | None = None) -> list[str]:
    """Return what kohya's sd-scripts leaves out of a LoRA of these modules; nothing if it applies all.

    share: of the squared change in the LoRA's layers, how much is in those left out; None if it is not known.
    """
    modules = list(modules)
    if any(module.startswith(BLOCKS_OF_TRANSFORMERS) for module in modules):
        return ["kohya's sd-scripts has other names for a transformer's layers, and cannot read this file"]
    unknown = sorted({module.partition(".")[0] for module in modules if not is_known_to_kohya(module)})
    if not unknown:
        return []
    number = sum(not is_known_to_kohya(module) for module in modules)
    held = "" if share is None else f", which hold {share:.2%} of the change in the file"
    return [
        f"kohya's sd-scripts ignores {number} of {len(modules)} layers ({', '.join(unknown)}){held}, and with "
        "safetensors before 0.5 cannot read the file; --lora_targets attention writes one that it applies whole"
    ]
