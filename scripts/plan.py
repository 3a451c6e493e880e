"""Plan a run: ds_dpo/commands/plan.py, run from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ds_dpo.__main__ import run_command

if __name__ == "__main__":
    run_command("plan")
