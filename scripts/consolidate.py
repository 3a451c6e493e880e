"""Turn the ZeRO shards of a run into a diffusers model; needs neither GPU nor DeepSpeed.

Examples:
    python scripts/consolidate.py runs/my_run runs/my_run/export
    python scripts/consolidate.py runs/my_run my_model --format pipeline --dtype bf16 --step 200
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_dpo.errors import run_program


def parse_arguments() -> argparse.Namespace:
    from ds_dpo.export.consolidate import FORMATS
    from ds_dpo.export.unet import DTYPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run folder, one of its checkpoints, or a save_dir of DeepSpeed")
    parser.add_argument("out", type=Path, help="folder to write; an earlier export there is replaced")
    parser.add_argument("--step", type=int, help="which checkpoint of the run; default: the newest whole one")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16", help="default: fp16, rounded from fp32")
    parser.add_argument("--format", choices=list(FORMATS), default="unet", help="the UNet alone, or with all around it")
    parser.add_argument("--base", metavar="MODEL", help="folder or hub id of the base; default: as the run says")
    parser.add_argument("--vae", metavar="MODEL", help="folder or hub id of a VAE to put into the pipeline")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from ds_dpo.export.consolidate import Request, consolidate
    from ds_dpo.quiet import quiet_libraries

    quiet_libraries()
    consolidate(Request(**vars(arguments)))


if __name__ == "__main__":
    run_program(main)
