"""Names of single files, against diffusers' own reader of them."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from unet_shapes import SD15, SDXL, TINY_SD15, TINY_SDXL, tiny_unet

from ds_dpo.errors import ModelError
from ds_dpo.export.denoiser import expected_shapes
from ds_dpo.models.weights.ldm_keys import UNET_PREFIX, ldm_names


@pytest.mark.parametrize(("config", "number"), [(SDXL, 1680), (SD15, 686)], ids=["sdxl", "sd15"])
def test_full_size_names_map_one_to_one_and_back(config, number):
    names = ldm_names(expected_shapes(config), config)
    assert len(names) == len(set(names.values())) == number
    # diffusers' reader moves values from name to name: let each value be the name that it should end at
    back = convert_ldm_unet_checkpoint({ldm: name for name, ldm in names.items()}, config)
    assert back == {name: name for name in names}


def test_names_that_everyone_knows():
    names = ldm_names(expected_shapes(SDXL), SDXL)
    known = {
        "conv_in.weight": "input_blocks.0.0.weight",
        "down_blocks.0.downsamplers.0.conv.bias": "input_blocks.3.0.op.bias",
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2.weight": (
            "input_blocks.8.1.transformer_blocks.9.ff.net.2.weight"
        ),
        "mid_block.resnets.1.time_emb_proj.weight": "middle_block.2.emb_layers.1.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.2.conv.weight",
        "up_blocks.2.resnets.0.conv_shortcut.bias": "output_blocks.6.0.skip_connection.bias",
        "add_embedding.linear_2.bias": "label_emb.0.2.bias",
    }
    assert {name: names[name] for name in known} == {name: UNET_PREFIX + ldm for name, ldm in known.items()}


@pytest.mark.parametrize("config", [TINY_SDXL, TINY_SD15], ids=["sdxl", "sd15"])
def test_tensors_come_back_bit_equal(config):
    unet = tiny_unet(config, seed=1)
    names = ldm_names(unet.state_dict(), config)
    single = {names[name]: weight for name, weight in unet.state_dict().items()}
    back = convert_ldm_unet_checkpoint(single, unet.config)
    assert back.keys() == unet.state_dict().keys()
    assert all(torch.equal(back[name], weight) for name, weight in unet.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers_per_block": [1, 2]}, r"layers_per_block \[1, 2\]"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image'"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
    ],
)
def test_what_single_files_cannot_express_is_named(change, said):
    with pytest.raises(ModelError, match=said):
        ldm_names([], {**TINY_SDXL, **change})
