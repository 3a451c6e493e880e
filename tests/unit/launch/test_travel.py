"""What travels to other hosts, and what never does."""

import os
import stat

import pytest

from ds_dpo.errors import ConfigError
from ds_dpo.launch.travel import read_usual_file, travelling_environment, write_environment_file


def test_secrets_stay():
    environ = {
        "PATH": "/venv/bin:/bin",
        "HF_HOME": "/shared/hf",
        "NCCL_SOCKET_IFNAME": "ib0",
        "UCX_NET_DEVICES": "mlx5_0:1",
        "FI_PROVIDER": "efa",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "XFORMERS_DISABLE_FLASH_ATTN": "1",
        "FIRST": "no prefix of ours",
        "https_proxy": "http://proxy:8080",
        "HOME": "/home/me",
        "CUDA_VISIBLE_DEVICES": "0",
        "HF_TOKEN": "hf_abc",
        "TORCH_SECRET": "x",
        "HTTP_PROXY": "http://me:password@proxy:8080",
        "GLOO_NOTE": "two\nlines",
        "WANDB_API_KEY": "w",
    }
    entries, kept = travelling_environment(environ)
    assert entries == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "FI_PROVIDER": "efa",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "UCX_NET_DEVICES": "mlx5_0:1",
        "XFORMERS_DISABLE_FLASH_ATTN": "1",
        "HF_HOME": "/shared/hf",
        "NCCL_SOCKET_IFNAME": "ib0",
        "PATH": "/venv/bin:/bin",
        "https_proxy": "http://proxy:8080",
    }
    assert kept == ["GLOO_NOTE", "HF_TOKEN", "HTTP_PROXY", "TORCH_SECRET"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_AUTH", "x"),
        ("NCCL_BASIC_AUTH", "x"),
        ("TORCH_PW", "x"),
        ("HF_PASS", "x"),
        ("HF_ENDPOINT", "https://hub.example/?auth=abc"),
        ("HF_ENDPOINT", "https://hub.example/x?a=1&X-Amz-Signature=abc"),
        ("HF_ENDPOINT", "https://hub.example/#access_token=abc"),
        ("HF_ENDPOINT", "https://me:abc@hub.example"),
        ("http_proxy", "http://TOKEN@proxy:8080"),
        ("HTTPS_PROXY", "me:abc@proxy:8080"),
        ("ALL_PROXY", "socks5h://abc@proxy"),
        ("HF_USERPW", "x"),
        ("TORCH_PWD1", "x"),
        ("HF_PSK", "x"),
        ("HF_SESSION", "x"),
        ("HF_ACCESS", "x"),
        ("NCCL_USER", "me:abc"),
        ("NO_PROXY", "localhost,tok@host"),
        ("HF_ENDPOINT", "https://hub.example/t/abc"),
        ("HF_ENDPOINT", "https://hub.example/api/8f3a9c2b7d1e4f60/models"),
        ("HF_ENDPOINT", "https://hub.example/0f8fad5b-d9cb-469f-a165-70867728950e"),
        ("HF_ENDPOINT", "https://hub.example/?k=abc"),
        ("HF_ENDPOINT", "https://hub.example/?a=1&code=abc"),
        ("TORCH_NOTE", "github_pat_11ABCDEFG0abcdefghijklmnop"),
        ("TORCH_NOTE", "npm_abcdefghijklmnopqrstuvwxyz"),
        ("TORCH_NOTE", "AIzaSyA1234567890abcdefghijklmnopqrstuv"),
        ("TORCH_NOTE", "hf_abcdefghijklmnopqrstuvwxyz"),
        ("TORCH_NOTE", "Bearer abcdefgh12345"),
        ("TORCH_NOTE", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc"),
    ],
)
def test_secrets_by_name_address_and_form_stay(name, value):
    assert travelling_environment({name: value}) == ({}, [name])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PATH", "/opt/pat/bin:/usr/bin"),
        ("HF_ENDPOINT", "https://hub.example/api?revision=main&page=2"),
        ("HF_ENDPOINT", "https://artifactory.example.com/artifactory/api/huggingfaceml/hf-remote-2024"),
        ("HF_USER", "me"),
        ("http_proxy", "http://proxy.example:8080"),
        ("NO_PROXY", "localhost,10.0.0.0/8,.example"),
        ("NCCL_SOCKET_IFNAME", "^lo,docker0"),
        ("TORCH_DISTRIBUTED_DEBUG", "DETAIL"),
        ("HF_HOME", "/home/me@site/hf"),
        ("OMP_PROC_BIND", "close"),
        ("CUDA_HOME", "/usr/local/cuda"),
    ],
)
def test_what_is_no_secret_travels(name, value):
    assert travelling_environment({name: value}) == ({name: value}, [])


def test_the_file_is_this_user_s_alone_and_as_deepspeed_reads_it(tmp_path):
    path = tmp_path / "run" / "launch.env"
    mask = os.umask(0)
    try:
        write_environment_file(path, {"A": "1"})
        write_environment_file(path, {"PATH": "/bin", "B": "x=y z"})
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "PATH=/bin\nB=x=y z\n"
    assert [tuple(line.split("=", maxsplit=1)) for line in path.open()] == [("PATH", "/bin\n"), ("B", "x=y z\n")]
    assert [file.name for file in path.parent.iterdir()] == ["launch.env"]


def test_the_user_s_own_file_is_taken_in(tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / ".deepspeed_env").write_text("A=1\nB=x=y\n")
    assert read_usual_file((tmp_path, tmp_path / "two")) == {"A": "1", "B": "x=y"}
    assert read_usual_file((tmp_path,)) == {}


@pytest.mark.parametrize(
    ("text", "said"), [("A=1\n\nB=2\n", "line 2"), ("# note\n", "line 1"), ("HF_TOKEN=hf_abc\n", "HF_TOKEN looks like")]
)
def test_a_file_that_cannot_travel(tmp_path, text, said):
    (tmp_path / ".deepspeed_env").write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_usual_file((tmp_path,))
    assert "hf_abc" not in str(caught.value)
