"""Tensors without values by which a single file states how its denoiser was trained; only their names matter.

Source: ComfyUI, comfy/supported_models.py, SDXL.model_type; Forge's huggingface_guess, model_list.py, the same;
stable-diffusion-webui, modules/sd_models_config.py and load_model_weights of modules/sd_models.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

V_PREDICTION = "v_pred"
ZERO_TERMINAL_SNR = "ztsnr"
# files of EDM's noising, of which no model here is; a program that finds one of them looks at no other flag
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
ALL = frozenset({V_PREDICTION, ZERO_TERMINAL_SNR, *EDM})


def flags_of(scheduler: Mapping[str, Any], *, states_prediction: bool) -> frozenset[str]:
    """Return the names of the flags of a model with this scheduler configuration.

    states_prediction: whether programs that load the family look for a flag of v-prediction.
    """
    flags = {
        V_PREDICTION: states_prediction and scheduler.get("prediction_type") == "v_prediction",
        ZERO_TERMINAL_SNR: bool(scheduler.get("rescale_betas_zero_snr")),
    }
    return frozenset(name for name, is_set in flags.items() if is_set)
