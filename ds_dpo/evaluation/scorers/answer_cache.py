"""Answers of servers on disk, by a hash of the images' pixels, the prompt and all settings that matter."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ds_dpo.config.base import UNSETTING, home, in_home
from ds_dpo.errors import ConfigError, cut
from ds_dpo.evaluation.scorers.asking import Question
from ds_dpo.outside import read_regular
from ds_dpo.storage.replace import replace_file

MAX_BYTES = 2**22
_WRITING = threading.Lock()  # the temporary name of a file is the process's, not the thread's


@dataclass(frozen=True)
class AnswerCache:
    """folder: of the answers, one file each; None keeps nothing. Any number of processes may use it at once."""

    folder: Path | None

    @classmethod
    def of(cls, setting: str | None) -> AnswerCache:
        """Return the cache of a setting: a folder, none, or unset for the user's. Raises ConfigError for no path."""
        if setting is None:
            cache = os.environ.get("XDG_CACHE_HOME") or ((place := home()) and place / ".cache")
            return cls(Path(cache).absolute() / "ds_dpo" / "answers" if cache else None)
        if setting.lower() in UNSETTING:
            return cls(None)
        try:
            return cls(Path(in_home(setting)).absolute())
        except ValueError as error:
            raise ConfigError(f"cache {cut(setting)}: {error}") from error

    @staticmethod
    def key(identity: Mapping[str, object], question: Question) -> str:
        """Return the hash of all that an answer depends on."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
        for image in question.images:
            digest.update(f"\0{image.width}x{image.height}\0".encode())
            digest.update(image.tobytes())
        digest.update(b"\0" + question.prompt.encode("utf-8", errors="surrogatepass"))
        return digest.hexdigest()

    def get(self, key: str) -> str | None:
        """Return a kept answer; None if there is none that can be read."""
        if self.folder is not None:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                return read_regular(self._path(self.folder, key), max_bytes=MAX_BYTES).decode()
        return None

    def put(self, key: str, answer: str) -> None:
        """Keep an answer, unless the disk refuses it: it is then asked for again."""
        if self.folder is not None:
            path = self._path(self.folder, key)
            with _WRITING, contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, answer, sync=False)

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.json"
