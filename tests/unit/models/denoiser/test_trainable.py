"""Patterns choose what is trained, and say so where they choose nothing."""

import pytest
from torch import nn

from ds_dpo.errors import ConfigError
from ds_dpo.models.denoiser.trainable import choose_trained, describe_trained


def model():
    unet = nn.Module()
    unet.conv_in = nn.Conv2d(1, 2, 1)  # 2 + 2
    unet.attn1 = nn.Linear(3, 3)  # 9 + 3
    unet.attn2 = nn.Linear(5, 5)  # 25 + 5
    return unet


def trained(unet):
    return [name for name, parameter in unet.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("train", "freeze", "expected"),
    [
        ([], [], ["conv_in.weight", "conv_in.bias", "attn1.weight", "attn1.bias", "attn2.weight", "attn2.bias"]),
        (["attn?.weight"], [], ["attn1.weight", "attn2.weight"]),
        (["attn1.*", "conv*"], ["*.bias"], ["conv_in.weight", "attn1.weight"]),
        ([], ["attn*"], ["conv_in.weight", "conv_in.bias"]),
    ],
)
def test_trained_are_those_of_train_but_not_of_freeze(train, freeze, expected):
    unet = model().requires_grad_(False)
    choose_trained(unet, train=train, freeze=freeze)
    assert trained(unet) == expected


def test_description_counts_elements():
    unet = model()
    choose_trained(unet, train=["attn2.*"], freeze=[])
    assert describe_trained(unet) == "trains 3e-05 M of 4.6e-05 M parameters"


@pytest.mark.parametrize(
    ("train", "freeze", "message"),
    [
        (
            ["atn2.*"],
            [],
            r"model.train atn2.\* matches no parameter of this model; .* attn2.bias and attn2.weight",
        ),
        ([], ["conv_out.*"], r"model.freeze conv_out.\* matches no parameter.*conv_in.weight"),
        (["attn1"], [], r"model.train attn1 matches no .*attn1.weight and attn1.bias"),
        (["attn1.*"], ["attn*"], r"model.freeze attn\* leaves nothing to train of the parameters in model.train attn1"),
        ([], ["*"], r"model.freeze \* leaves nothing to train"),
    ],
)
def test_patterns_without_effect_are_refused(train, freeze, message):
    with pytest.raises(ConfigError, match=message):
        choose_trained(model(), train=train, freeze=freeze)
