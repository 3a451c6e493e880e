"""What other programs read in an exported file, written anew from their rules; each names repository and file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

UNET = "model.diffusion_model."
# kohya-ss/sd-scripts, library/sdxl_model_util.py, make_unet_conversion_map: beginnings of the names that it converts
KOHYA_SDXL = (
    *(f"down_blocks_{i}_{part}_{j}_" for i in range(3) for j in range(2) for part in ("resnets", "attentions")),
    *(f"up_blocks_{i}_{part}_{j}_" for i in range(3) for j in range(3) for part in ("resnets", "attentions")),
    *(f"down_blocks_{i}_downsamplers_0_conv" for i in range(3)),
    *(f"up_blocks_{i}_upsamplers_0" for i in range(3)),
    "mid_block_attentions_0_",
    *(f"mid_block_resnets_{j}_" for j in range(2)),
)
# kohya-ss/sd-scripts, networks/lora.py: classes of modules below which LoRANetwork looks for layers, as diffusers names
# the modules of those classes
KOHYA_BLOCKS = ("attentions", "resnets", "downsamplers", "upsamplers")


def comfy_sampling(names: Iterable[str], *, is_sdxl: bool, from_diffusion_models: bool = False) -> tuple[str, bool]:
    """What ComfyUI samples: prediction and zero terminal SNR.

    ComfyUI, comfy/supported_models.py, model_type of SDXL and of its base class; comfy/sd.py,
    load_diffusion_model_state_dict, which first keeps only what has the UNet's prefix, without it, if anything has.
    """
    names = set(names)
    if from_diffusion_models and any(name.startswith(UNET) for name in names):
        names = {name.removeprefix(UNET) for name in names if name.startswith(UNET)}
    if not is_sdxl:
        return "epsilon", False
    if {"edm_mean", "edm_std"} <= names or "edm_vpred.sigma_max" in names:
        return "edm", False
    return ("v_prediction", "ztsnr" in names) if "v_pred" in names else ("epsilon", False)


def webui_sampling(names: Iterable[str], *, is_sdxl: bool) -> tuple[str, bool]:
    """What A1111 samples: AUTOMATIC1111/stable-diffusion-webui, modules/sd_models_config.py, sd_models.py."""
    names = set(names)
    return ("v_prediction" if is_sdxl and "v_pred" in names else "epsilon"), "ztsnr" in names


def kohya_modules(names: Sequence[str]) -> set[str]:
    """The modules of an SDXL LoRA that sd-scripts applies, given a file's tensors in the order in which it reads them.

    networks/lora.py: convert_diffusers_to_sai_if_needed, which fails at a name that it does not know before the first
    that it knows, and create_network_from_weights. Raises UnboundLocalError as that does.
    """
    modules = [name.split(".")[0].removeprefix("lora_unet_") for name in names if name.startswith("lora_unet_")]
    if any("down_blocks" in name or "up_blocks" in name for name in names):
        was_found = False
        for module in modules:
            was_found = was_found or any(known in module for known in KOHYA_SDXL)
            if not was_found:
                raise UnboundLocalError(module)
    return {module for module in modules if any(f"_{block}_" in module for block in KOHYA_BLOCKS)}
