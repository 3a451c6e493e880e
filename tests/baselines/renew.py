#!/usr/bin/env python
"""Write the committed loss curves anew, after a change that is meant to move every run.

    python tests/baselines/renew.py

Commit miniature_fp32.jsonl together with the change, and say in the commit why the curves moved. About a minute.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from baseline_cases import BASELINES, OBJECTIVES, read_baselines, train_all, write_baselines


def main() -> None:
    earlier = read_baselines() if BASELINES.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        curves = train_all(Path(folder))
    write_baselines(curves)
    for name in OBJECTIVES:
        pairs = list(zip(curves[name], earlier.get(name, []), strict=False))
        moved = max((abs(new / old - 1) for new, old in pairs), default=None)
        print(f"{name}: {'new' if moved is None else f'moved by at most {moved:.1e} of the loss'}")


if __name__ == "__main__":
    main()
