"""Print the output_dir of a run from the arguments of train.py: from a preset, a file or an option.

Example:
    python scripts/slurm/output_dir.py --config sdxl_pickapic
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ds_dpo.errors import run_program


def main() -> None:
    from ds_dpo.config.load import load_config

    print(load_config(sys.argv[1:]).config.output_dir)


if __name__ == "__main__":
    run_program(main)
