"""Keep libraries from printing over a run's own words, without hiding a failure."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_output() -> Iterator[None]:
    """Hold back what Python code prints or warns inside; if it raises, print all of it, then let the error go on."""
    held = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(held),
            contextlib.redirect_stderr(held),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    except BaseException:
        sys.stderr.write(held.getvalue())
        raise


def quiet_libraries() -> None:
    """Set the loggers of the libraries that we build on to errors only, for the whole process."""
    for name in (
        "deepspeed",
        "DeepSpeed",
        "diffusers",
        "transformers",
        "datasets",
        "huggingface_hub",
        "torch.distributed",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
