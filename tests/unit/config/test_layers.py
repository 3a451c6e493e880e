"""Own data over a preset: what describes the preset's data set no longer holds, and all else does."""

from pathlib import Path

import pytest

from ds_dpo.config.fields import FIELDS
from ds_dpo.config.layers import NAMES_HELD_OUT_PAIRS, OF_DATA_SET, Layer, merge
from ds_dpo.config.load import load_config, preset_names
from ds_dpo.errors import ConfigError

PRESET = {
    "data.dataset": "hub/set",
    "data.split": "validation",
    "data.columns": ["prompt=text"],
    "data.expected_pairs": 7,
    "data.flip": "shared",
    "held_out.every_steps": 100,
    "held_out.split": "test",
    "held_out.num_pairs": 64,
}
KEPT = {"data.flip": "shared", "held_out.num_pairs": 64}


def merged(*user: dict) -> dict:
    return merge([Layer(values=PRESET, is_preset=True), *(Layer(values=values) for values in user)]).values


@pytest.mark.parametrize(
    ("user", "wanted"),
    [
        ([{"seed": 1}], PRESET | {"seed": 1}),
        ([{"data.dataset": "hub/set", "data.format": "pickapic"}], PRESET | {"data.format": "pickapic"}),
        # a copy of the same data set on a disk
        ([{"data.dataset": "/disk/set"}], PRESET | {"data.dataset": "/disk/set"}),
        ([{"data.dataset": "own"}], KEPT | {"data.dataset": "own"}),
        ([{"data.dataset": "hub/set", "data.format": "ranked"}], KEPT | {"data.dataset": "hub/set"}),
        ([{"data.format": "ranked"}], KEPT),
        ([{"data.dataset": "own", "data.split": "b"}], KEPT | {"data.dataset": "own", "data.split": "b"}),
        ([{"data.split": "b"}, {"data.dataset": "own"}], KEPT | {"data.dataset": "own", "data.split": "b"}),
        ([{"data.dataset": "a"}, {"data.dataset": "hub/set"}], PRESET),
        *[
            ([{"data.dataset": "own"}, {name: value}], KEPT | {name: value, "held_out.every_steps": 100})
            for name, value in (("held_out.share", 0.1), ("held_out.split", "b"), ("held_out.dataset", "c"))
        ],
        ([{"data.dataset": "own", "held_out.split": None}], KEPT | {"held_out.split": None}),
    ],
)
def test_what_a_users_layers_leave_of_a_preset(user: list[dict], wanted: dict) -> None:
    own = {name: value for layer in user for name, value in layer.items()}
    assert merged(*user) == wanted | own


def test_every_field_of_data_is_the_data_sets_or_holds_for_any() -> None:
    for_any = {
        *("cache_dir", "ties", "max_pairs_per_prompt", "max_rows", "resolution", "aspect_buckets", "bucket_step"),
        *("max_aspect", "crop", "flip", "size_conditioning", "prompt_dropout", "max_bad_rows", "workers", "prefetch"),
    }
    held_out_for_any = {"share", "num_pairs", "draws_per_decile", "seed"}
    names = {name for name, spec in FIELDS.items() if spec.section in ("data", "held_out")}
    assert names - set(OF_DATA_SET) == {
        *(f"data.{name}" for name in for_any),
        *(f"held_out.{name}" for name in held_out_for_any),
    }
    assert {*OF_DATA_SET, *NAMES_HELD_OUT_PAIRS} <= names


def test_the_readmes_example_holds_nothing_of_pickapic(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: sdxl_pickapic\ndata: {dataset: /data/pairs, format: chosen_rejected, columns: [prompt=text]}\n"
    )
    loaded = load_config(["--config", str(path)])
    data, held_out = loaded.config.data, loaded.config.held_out
    assert (data.split, data.expected_pairs, data.flip) == ("train", None, "independent")
    assert (held_out.every_steps, held_out.split, held_out.num_pairs) == (None, None, 128)
    assert loaded.remarks == [
        "data.dataset /data/pairs: the preset's data set is another, so these no longer hold: data.expected_pairs "
        "851293, held_out.every_steps 100, held_out.split validation_unique; held_out.share 0.05 holds out pairs of "
        "your own"
    ]
    shared = load_config(["--config", str(path), "--held_out.share", "0.05"])
    assert shared.config.held_out.every_steps == 100
    assert "held_out.every_steps" not in "".join(shared.remarks)


def test_another_format_needs_a_data_set_of_its_own() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["--data.format", "manifest"])
    assert "data.dataset must be given" in str(caught.value)
    assert "no longer hold: data.dataset yuvalkirstain/pickapic_v2" in str(caught.value)


def test_a_preset_alone_says_nothing() -> None:
    assert [load_config(["--config", name]).remarks for name in preset_names()] == [[]] * len(preset_names())
