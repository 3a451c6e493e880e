"""CLIP's text encoders as parts of a family: OpenAI's, and OpenCLIP's, whose names in single files differ."""

from __future__ import annotations

from functools import partial

from ds_dpo.models.families.family import TextPart
from ds_dpo.models.weights.derived_configs import derived_clip_config, derived_open_clip_config
from ds_dpo.models.weights.ldm_parts import clip_places, open_clip_places


def clip_part(*, prefix: str, is_projected: bool = False) -> TextPart:
    """Return a text encoder under OpenAI's names. prefix: of its tensors' names in a single file.

    is_projected: its pooled text is used.
    """
    return TextPart(class_name=_class_name(is_projected), prefix=prefix, places=clip_places, derive=derived_clip_config)


def open_clip_part(*, prefix: str, is_projected: bool, unused_layers: int = 0) -> TextPart:
    """Return OpenCLIP's text encoder.

    is_projected: its pooled text is used. unused_layers: the last ones of a single file, which the denoiser never saw.
    """
    return TextPart(
        class_name=_class_name(is_projected),
        prefix=prefix,
        places=open_clip_places,
        derive=partial(derived_open_clip_config, unused_layers=unused_layers),
    )


def _class_name(is_projected: bool) -> str:
    return "CLIPTextModelWithProjection" if is_projected else "CLIPTextModel"
