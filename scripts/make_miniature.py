#!/usr/bin/env python
"""Make the miniature: train its base model on drawings, then sample preference pairs from that model.

    python scripts/make_miniature.py --work runs/miniature [--output ds_dpo/assets/miniature]

Takes about an hour and a half on one core. The same command continues an interrupted run from its last saved state.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_dpo.config.version import version_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=version_text(), help="Print the version and exit.")
    parser.add_argument("--work", type=Path, default=Path("runs/miniature"), help="Folder for training states.")
    parser.add_argument(
        "--output", type=Path, default=Path("ds_dpo/assets/miniature"), help="Folder for model/ and pairs/."
    )
    parser.add_argument("--threads", type=int, default=1, help="Number of torch's threads.")
    arguments = parser.parse_args()
    import torch

    from ds_dpo.miniature.models import save_pipeline
    from ds_dpo.miniature.pairs import write_pairs
    from ds_dpo.miniature.pretrain import describe_quality, pretrain_unet, pretrain_vae
    from ds_dpo.process.quiet import quiet_libraries

    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    arguments.work.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        print(line, flush=True)

    vae = pretrain_vae(arguments.work, say=say)
    text, unet = pretrain_unet(arguments.work, vae, say=say)
    say(describe_quality(text, unet, vae, per_prompt=8))
    save_pipeline(arguments.output / "model", text=text, vae=vae, unet=unet)
    write_pairs(arguments.output / "model", arguments.output / "pairs", say=say)


if __name__ == "__main__":
    main()
