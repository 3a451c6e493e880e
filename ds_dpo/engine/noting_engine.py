"""What stands in DeepSpeed's place for a CheckpointEngine: it notes what is to be saved, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_dpo.storage.state_files import StateFile


class NotingCheckpointEngine:
    """DeepSpeed's CheckpointEngine as before, but that a save is noted down instead of done.

    So nothing in DeepSpeed's save touches the disk: no rank can fail in its middle and leave the others in a barrier.
    The interface: deepspeed.runtime.checkpoint_engine.checkpoint_engine.CheckpointEngine of 0.19.8.
    """

    def __init__(self, original: Any) -> None:
        """original: reads files, and writes those that were noted down."""
        self._original = original
        self._noted: list[StateFile] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make no folder: whoever writes the files has one."""

    def save(self, state_dict: Any, path: str) -> None:
        """Note down one file of this rank's; its state may still be the engine's own."""
        self._noted.append(StateFile(name=Path(path).name, state=state_dict, write=self._original.save))

    def note(self, save: Callable[[], object]) -> list[StateFile]:
        """Return the files that DeepSpeed's save would have written."""
        self._noted = []
        save()
        noted, self._noted = self._noted, []
        return noted
