"""The checkpoints folder of a run, its store and its writer; a fake engine writes two small files."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from ds_dpo.checkpoints.best import BestCheckpoint
from ds_dpo.checkpoints.folder import Retention
from ds_dpo.checkpoints.identity import RunIdentity
from ds_dpo.checkpoints.store import CheckpointStore
from ds_dpo.checkpoints.writer import CheckpointWriter, Contents
from ds_dpo.engine.engine import Engine
from ds_dpo.storage.manifest import hash_file
from ds_dpo.storage.state_files import StateFile

IDENTITY = RunIdentity(world_size=1, stage=2, precision="bf16", fingerprint="f")


class FakeEngine:
    """Writes and reads what DeepSpeed's files stand for."""

    module = SimpleNamespace(config={"in_channels": 4, "_name_or_path": "/home/someone/model"})
    needed_bytes = 10
    layout = "as first"

    def layout_digest(self) -> str:
        return self.layout

    def __init__(self) -> None:
        self.moments = torch.tensor([1.0, 2.0])

    def checkpoint_bytes(self) -> int:
        return self.needed_bytes

    def own_checkpoint_bytes(self) -> int:
        return self.needed_bytes

    def checkpoint_files(self, *, client_state: Mapping[str, Any]) -> list[StateFile]:
        return [
            StateFile(name="mp_rank_00_model_states.pt", state=dict(client_state), write=self.write),
            StateFile(
                name="zero_pp_rank_0_mp_rank_00_optim_states.pt",
                state={"moments": self.moments},
                write=lambda state, path: self.write({"moments": state["moments"].tolist()}, path),
            ),
        ]

    def write(self, state: Any, path: Path) -> None:
        torch.save(state, path)

    def read_checkpoint(self, folder: Path) -> dict[str, Any]:
        # as DeepSpeed does it: each file of this rank, and code in it would run
        states = [torch.load(path, weights_only=False) for path in sorted(folder.glob("*_states.pt"))]
        return dict(states[0])

    def read_checkpoint_of_other_layout(self, folder: Path) -> dict[str, Any]:
        return {"from another layout": self.read_checkpoint(folder)}


class Run:
    """A checkpoints folder and what its store says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.engine = FakeEngine()
        self.identity = IDENTITY

    def store(self, *, identity: RunIdentity | None = None) -> CheckpointStore:
        identity = identity or self.identity
        engine = cast(Engine, self.engine)
        return CheckpointStore(self.folder, engine=engine, identity=identity, say=self.said.append)

    def claim(self, step: int, /, **values: Any) -> None:
        """Change what the manifest of a step says, its files' checksums included."""
        folder = self.folder / f"step_{step:08d}"
        path = folder / "manifest.json"
        told = json.loads(path.read_text())
        files = {name: asdict(hash_file(folder / name)) for name in told["files"]}
        path.write_text(json.dumps({**told, "files": files, **values}))

    def writer(
        self,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        best: BestCheckpoint | None = None,
        memory: int = 2**30,
    ) -> CheckpointWriter:
        return CheckpointWriter(
            self.folder,
            engine=cast(Engine, self.engine),
            identity=self.identity,
            retention=Retention(newest=keep, every_steps=keep_every),
            say=self.said.append,
            best=best,
            available_bytes=lambda: memory,
        )

    def save(self, *steps: int, keep: int = 2, keep_every: int | None = None, renews: bool = False) -> None:
        for step in steps:
            self.writer(keep=keep, keep_every=keep_every).save(step=step, contents=contents(step), renews=renews)

    def loaded(self) -> dict[str, Any] | None:
        found = self.store().load_newest()
        return None if found is None else found.client_state

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def damage(self, step: int) -> None:
        (self.folder / f"step_{step:08d}" / "mp_rank_00_model_states.pt").write_text("{}")


def contents(step: int, *files: StateFile) -> Contents:
    return Contents(client_state={"step": step}, files=files)
