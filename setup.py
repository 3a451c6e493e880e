"""Installs ds_dpo with honest ranges; requirements/ holds the exact versions that it was tested with."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def files_under(package: str, folder: str) -> list[str]:
    """Files of a data folder, as setuptools wants them: relative to their package."""
    root = HERE / package
    return [str(path.relative_to(root)) for path in sorted((root / folder).rglob("*")) if path.is_file()]


setup(
    name="ds_dpo",
    version=runpy.run_path(str(HERE / "ds_dpo" / "config" / "version.py"))["VERSION"],
    description="Diffusion-DPO for text-to-image models on DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    # ds_configs has no code: it lies beside the package, in a checkout and installed alike
    entry_points={"console_scripts": ["ds-dpo = ds_dpo.__main__:main"]},
    packages=[*find_packages(include=["ds_dpo", "ds_dpo.*"]), "ds_configs"],
    package_data={
        "ds_dpo": [*files_under("ds_dpo", "presets"), *files_under("ds_dpo", "assets")],
        "ds_dpo.evaluation.pages": ["template/*"],
        "ds_dpo.export.card": ["*.jinja"],
        "ds_configs": ["*.json"],
    },
    install_requires=[
        "torch>=2.8",
        "deepspeed>=0.19.8,<0.20",
        "diffusers>=0.42,<0.43",
        "transformers>=5.23,<6",
        "accelerate>=1.10",
        "datasets>=5.0",
        "huggingface_hub>=2.0",
        "jinja2>=3.1",
        "safetensors>=0.6",
        "tensorboard>=2.20",
        "pydantic>=2.12,<3",
        "pyyaml>=6",
        "hjson>=3.1",
        "numpy>=2.0",
        "isal>=1.7",
        "pillow>=11",
        "requests>=2.32",
        "tqdm>=4.67",
    ],
    extras_require={
        "xformers": ["xformers>=0.0.33"],
        "lora": ["peft>=0.18"],
        # scorers brisque and ocr; libsvm-official, which brisque needs, is compiled when it is installed
        "eval": ["brisque[opencv-python-headless]>=0.2,<0.3", "rapidocr>=3.10,<4", "onnxruntime>=1.20"],
        "wandb": ["wandb>=0.19"],
        "trackio": ["trackio>=0.2"],
        "dev": [
            "pytest",
            "ruff",
            "mypy",
            "import-linter",
            "types-PyYAML",
            "peft>=0.18",
            "selenium>=4.40",
            "ds_dpo[eval]",
        ],
    },
)
