"""A replacement for DeepSpeed's CheckpointEngine that records what a save would write, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_dpo.storage.state_files import StateFile
from ds_dpo.zero_shards.unpickle import load_file


class NotingCheckpointEngine:
    """DeepSpeed's CheckpointEngine, except that a save is recorded instead of written.

    DeepSpeed's save then never touches the disk, so that no rank can fail inside it and leave the others in a barrier.
    The interface: deepspeed.runtime.checkpoint_engine.checkpoint_engine.CheckpointEngine of 0.19.8.
    """

    def __init__(self, original: Any) -> None:
        """original: reads files, and writes the recorded ones."""
        self._original = original
        self._noted: list[StateFile] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make no folder: the writer of the files does."""

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load a file for DeepSpeed, whose torch.load would run any code in it.

        Raises CheckpointError, before anything is loaded, if it asks for what no checkpoint needs.
        """
        load_file(Path(path))
        return self._original.load(path, map_location=map_location)

    def save(self, state_dict: Any, path: str) -> None:
        """Record one file of this rank; its state may share the engine's tensors."""
        self._noted.append(StateFile(name=Path(path).name, state=state_dict, write=self._original.save))

    def note(self, save: Callable[[], object]) -> list[StateFile]:
        """Return the files that DeepSpeed's save would have written."""
        self._noted = []
        save()
        noted, self._noted = self._noted, []
        return noted
