"""No file of a checkpoint runs code where its weights are read: exported, as another run's start, or repeated."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from payloads import WRITERS, Payload
from zero_checkpoint import save_run

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import DsDpoError
from ds_dpo.export.consolidate import consolidate
from ds_dpo.export.request import Request
from ds_dpo.models.loading import load_denoiser
from ds_dpo.models.start import checkpoint_start
from ds_dpo.storage.manifest import Manifest, hash_file, write_manifest
from ds_dpo.zero_shards.reader import open_checkpoint


def exported(checkpoint, base, out, **options):
    source = checkpoint.parents[1]
    consolidate(Request(source=source, out=out, format="denoiser", base=str(base), **options), say=lambda line: None)


def started_from(checkpoint, base, out):
    model = ModelConfig(pretrained=str(base), denoiser_init=str(checkpoint))
    load_denoiser(model, dtype=torch.float32, start=checkpoint_start(model))
    out.mkdir()


def repeated(checkpoint, base, out):
    opened = open_checkpoint(checkpoint, verify=True)
    for name in opened.parameters:
        opened.read(name)
    out.mkdir()


WAYS = {
    "consolidate": exported,
    "consolidate --ema": lambda checkpoint, base, out: exported(checkpoint, base, out, ema=True),
    "model.denoiser_init": started_from,
    "replay": repeated,
}
# which file each way reads
READ = {
    "mp_rank_00_model_states.pt": {*WAYS},
    "zero_pp_rank_1_mp_rank_00_optim_states.pt": {*WAYS},
    "ema_rank_00000.pt": {*WAYS},
    "denoiser_config.json": {"consolidate", "consolidate --ema"},
}


@pytest.fixture(scope="module")
def base():
    return resolve_asset("ds_dpo://assets/miniature/model")


@pytest.fixture(scope="module")
def unet(base):
    return UNet2DConditionModel.from_pretrained(str(base), subfolder="unet")


@pytest.fixture
def checkpoint(tmp_path, base, unet):
    weights = unet.state_dict()
    return save_run(tmp_path / "run", weights, base=base, config=unet.config, ema=weights)


def certify(checkpoint):
    """Write a manifest whose checksums agree with whatever is in the folder, as whoever placed a payload would."""
    files = {path.name: hash_file(path) for path in checkpoint.iterdir() if path.name != "manifest.json"}
    manifest = Manifest(step=7, world_size=2, stage=2, precision="bf16", fingerprint="", files=files)
    write_manifest(checkpoint, manifest)


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_without_a_payload_goes_each_way(checkpoint, base, tmp_path, way):
    certify(checkpoint)
    WAYS[way](checkpoint, base, tmp_path / "out")
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_payload_does_not_run_whichever_way_weights_are_read(checkpoint, base, tmp_path, way, write, name):
    target, out = tmp_path / "ran", tmp_path / "out"
    write(Payload(target), checkpoint / name)
    certify(checkpoint)
    if way in READ[name]:
        with pytest.raises(DsDpoError, match=name):
            WAYS[way](checkpoint, base, out)
        assert not out.exists()
    else:
        WAYS[way](checkpoint, base, out)
    assert not target.exists()
