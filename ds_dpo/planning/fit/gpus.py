"""GPUs by name: memory, arithmetic, and how fast they reach each other. All are figures of their makers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """memory_bytes: as the driver reports it, about. flop_per_second: dense products in bf16, or fp16 where it has no
    bf16. link_bytes_per_second: between GPUs of one host, one way.
    """

    title: str
    memory_bytes: float
    flop_per_second: float
    link_bytes_per_second: float


# Sources: NVIDIA's data sheets of each product; a link over PCIe is given as two thirds of its rate.
GPUS: dict[str, Gpu] = {
    "4090": Gpu(title="RTX 4090", memory_bytes=24.5e9, flop_per_second=165e12, link_bytes_per_second=20e9),
    "a6000": Gpu(title="RTX A6000", memory_bytes=48.0e9, flop_per_second=155e12, link_bytes_per_second=20e9),
    "l40s": Gpu(title="L40S", memory_bytes=46.0e9, flop_per_second=362e12, link_bytes_per_second=20e9),
    "v100-32": Gpu(title="V100 32 GB", memory_bytes=32.5e9, flop_per_second=125e12, link_bytes_per_second=150e9),
    "a100-40": Gpu(title="A100 40 GB", memory_bytes=40.5e9, flop_per_second=312e12, link_bytes_per_second=300e9),
    "a100-80": Gpu(title="A100 80 GB", memory_bytes=81.2e9, flop_per_second=312e12, link_bytes_per_second=300e9),
    "h100": Gpu(title="H100 80 GB", memory_bytes=81.2e9, flop_per_second=989e12, link_bytes_per_second=450e9),
    "h200": Gpu(title="H200 141 GB", memory_bytes=143.0e9, flop_per_second=989e12, link_bytes_per_second=450e9),
    "b200": Gpu(title="B200 180 GB", memory_bytes=180.0e9, flop_per_second=2250e12, link_bytes_per_second=900e9),
}
DEFAULT_GPU = "a100-80"
GPUS_OF_A_HOST = 8
