#!/usr/bin/env python
"""Make the miniature: train its base model on drawings, then sample preference pairs from that model.

    python scripts/make_miniature.py           the first one, shaped like SDXL: an hour and a half on one core
    python scripts/make_miniature.py --flow    the one shaped like Stable Diffusion 3: half an hour

The second one takes its VAE and CLIPs from the first one, and trains a transformer and T5.
The same command continues an interrupted run from its last saved state.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_dpo.config.asset_paths import PACKAGE
from ds_dpo.config.version import version_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=version_text(), help="Print the version and exit.")
    parser.add_argument("--flow", action="store_true", help="Make the flow miniature.")
    parser.add_argument("--work", type=Path, help="Folder for training states (default: runs/NAME).")
    parser.add_argument(
        "--output", type=Path, help="Folder for model/ and pairs/ (default: that of the package, ds_dpo/assets/NAME)."
    )
    parser.add_argument("--threads", type=int, default=1, help="Number of torch's threads.")
    arguments = parser.parse_args()
    import torch

    from ds_dpo.miniature.kinds import FLOW_KIND, SDXL_KIND, save_parts
    from ds_dpo.miniature.pairs import write_pairs
    from ds_dpo.miniature.pretrain import describe_quality, pretrain
    from ds_dpo.process.quiet import quiet_libraries

    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    kind = FLOW_KIND if arguments.flow else SDXL_KIND
    work = arguments.work or Path("runs") / kind.name
    output = arguments.output or PACKAGE / "assets" / kind.name
    work.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        print(line, flush=True)

    parts = pretrain(work, kind, say=say)
    say(describe_quality(parts, per_prompt=8))
    save_parts(parts, output / "model")
    write_pairs(kind, output / "model", output / "pairs", say=say)


if __name__ == "__main__":
    main()
