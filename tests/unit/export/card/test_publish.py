import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_stand_in import Hub, Repository
from huggingface_hub.utils import close_session

from ds_dpo.errors import ConfigError, DsDpoError, ModelError, run_program
from ds_dpo.export.card.card import CardFacts, write_card
from ds_dpo.export.card.publish import push_folder

TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, in place of the real hub for everything that the client might ask."""
    with Hub(token=TOKEN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name, value in {
            "ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_XET": True,  # its server is not to be had; files go by LFS, as the hub still takes them
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        close_session()
        yield hub
        close_session()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text('{"a": 1}')
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(os.urandom(300_000))
    (folder / "lora.safetensors").write_bytes(os.urandom(1000))
    write_card(folder, CardFacts(format="denoiser"))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_arrives_as_it_is(hub, export, capfd) -> None:
    said: list[str] = []
    address = push_folder(export, "me/mine", say=said.append)
    assert address == f"{hub.endpoint}/me/mine"
    assert hub.repositories["me/mine"].files == contents(export)
    assert not hub.repositories["me/mine"].private
    assert said[0] == f"uploading 4 files, 0.000 GB, to {hub.endpoint}/me/mine"
    assert address in said[-1]
    # the token goes to the hub with each request, and to nobody else
    of_repository = [token for _, path, token in hub.requests if "me/mine" in path or path == "/api/repos/create"]
    assert set(of_repository) == {f"Bearer {TOKEN}"}
    assert [token for method, _, token in hub.requests if method == "PUT"] == [None, None]
    out, err = capfd.readouterr()
    assert TOKEN not in out + err + "".join(said)


def test_again_it_updates_what_is_there(hub, export) -> None:
    push_folder(export, "me/mine", private=True)
    assert hub.repositories["me/mine"].private
    (export / "unet" / "config.json").write_text('{"a": 2}')
    push_folder(export, "me/mine", private=True)
    assert hub.repositories["me/mine"].files == contents(export)
    assert len(hub.repositories["me/mine"].summaries) == 2


def test_private_weights_go_into_no_public_repository(hub, export) -> None:
    hub.repositories["me/mine"] = Repository(private=False)
    with pytest.raises(ConfigError, match=r"me/mine: exists and is public"):
        push_folder(export, "me/mine", private=True)
    assert hub.repositories["me/mine"].files == {}


def test_the_login_file_is_a_token_too(hub, export, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match=r"me/mine: there is no token.*HF_TOKEN.*hf auth login"):
        push_folder(export, "me/mine")
    assert hub.requests == []
    (tmp_path / "token").write_text(TOKEN)
    push_folder(export, "me/mine")
    assert hub.repositories["me/mine"].files == contents(export)


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/", "me/mi ne", "me/mine.git", "../x", "", "me/" + "x" * 100])
def test_a_name_that_cannot_be_is_refused_first(hub, export, name) -> None:
    with pytest.raises(ConfigError, match="owner/"):
        push_folder(export, name)
    assert hub.requests == []


def test_an_empty_folder_makes_no_repository(hub, tmp_path) -> None:
    for folder in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(ModelError, match=f"{folder}: has no file.*me/mine"):
            push_folder(folder, "me/mine")
        (tmp_path / "empty").mkdir(exist_ok=True)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("where", "status", "message"),
    [
        ("/api/repos/create", 403, r"me/mine: the token may not write there.*status 403: no, not you"),
        ("/api/repos/create", 402, r"me/mine: .*payment.*status 402"),
        ("/api/repos/create", 418, r"me/mine: the hub refuses the upload \(status 418: no, not you"),
        ("/api/repos/create", 500, r"me/mine: the hub failed: try again later \(status 500"),
        ("/preupload/", 403, r"me/mine: the token may not write there.*status 403"),
        ("/objects/batch", 413, r"me/mine: .*too large.*status 413"),
        ("/storage/", 403, r"me/mine: .*status 403"),
        ("/commit/", 409, r"me/mine: another upload is writing there; try again .status 409"),
        ("/commit/", 412, r"me/mine: .*wrote there.*status 412"),
        ("/commit/", 404, r"me/mine: .*the owner or repository does not exist.*status 404"),
    ],
)
def test_what_the_hub_refuses_is_told_with_a_cure(hub, export, capfd, where, status, message) -> None:
    before = contents(export)
    hub.answers[where] = (status, f"no, not you with {TOKEN}")
    with pytest.raises(ModelError, match=message) as caught:
        push_folder(export, "me/mine")
    assert TOKEN not in str(caught.value)
    assert contents(export) == before
    assert "me/mine" not in hub.repositories or hub.repositories["me/mine"].files == {}
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_token_that_the_hub_does_not_know(hub, export, monkeypatch, capfd) -> None:
    """The stand-in sends the token back, which must not be shown."""
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    with pytest.raises(SystemExit):
        run_program(lambda: str(push_folder(export, "me/mine")) and None)
    out, err = capfd.readouterr()
    assert "error: me/mine: the hub does not accept the token" in err
    assert "hf_stale" not in out + err


def test_a_card_that_the_hub_does_not_take(hub, export) -> None:
    (export / "README.md").write_text("---\ntags: []\n---\n")
    with pytest.raises(ModelError, match=r'(?s)me/mine: refused:.*"license" is missing'):
        push_folder(export, "me/mine")
    assert hub.repositories["me/mine"].files == {}


def test_no_network(hub, export, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(ModelError, match=r"me/mine: the upload to http://127.0.0.1:9 failed.*when it can be reached"):
        push_folder(export, "me/mine")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(DsDpoError, match=r"me/mine: nothing is uploaded while HF_HUB_OFFLINE is set"):
        push_folder(export, "me/mine")
