"""The images of an evaluation: written in a thread beside the device, recorded, and verified when read again."""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ds_dpo.distributed.collectives import gather_objects
from ds_dpo.errors import ConfigError
from ds_dpo.evaluation.run.line_log import Line, LineLog, read_lines
from ds_dpo.evaluation.run.settings import Settings
from ds_dpo.evaluation.run.side_effects import Look, look_of
from ds_dpo.evaluation.run.work import IMAGES_NAME, ImageTask, share_of
from ds_dpo.outside import open_regular
from ds_dpo.process.say import Say
from ds_dpo.storage.replace import replace_file

HASHING_THREADS = 8
NEEDED = ("path", "sha256", *Look.__dataclass_fields__)


@dataclass(frozen=True)
class DrawnImage:
    """An image on the disk: digest of its file, and how it looks."""

    sha256: str
    look: Look


class ImageWriter:
    """Encodes and writes images in a thread. lines: what was recorded of them so far."""

    def __init__(self, out: Path, settings: Settings, *, rank: int) -> None:
        self._out, self._settings = out, settings
        self._log = LineLog(out / IMAGES_NAME, rank=rank)
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[Line]] = deque()
        self.lines: list[Line] = []

    def put(self, batch: Sequence[ImageTask], pixels: Sequence[NDArray[np.uint8]]) -> None:
        """Take images (X, Y, 3), and write them while the next batch is drawn; a kill loses no more than these two.

        Raises ConfigError if the batch before cannot be written.
        """
        self._wait()
        self._waiting += [self._thread.submit(self._write, *each) for each in zip(batch, pixels, strict=True)]

    def close(self) -> None:
        """Wait until all images are written. Raises ConfigError if one cannot be."""
        try:
            self._wait()
            self._log.close()
        finally:
            self._thread.shutdown(cancel_futures=True)

    def _wait(self) -> None:
        while self._waiting:
            self.lines.append(self._waiting.popleft().result())

    def _write(self, task: ImageTask, pixels: NDArray[np.uint8]) -> Line:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", pnginfo=_png_text(task, self._settings))
        content, path = buffer.getvalue(), self._out / task.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content, sync=False)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another folder") from error
        # recorded after the file: an image without a record is drawn again
        line = {"path": task.path, "sha256": hashlib.sha256(content).hexdigest(), **asdict(look_of(pixels))}
        self._log.append([line])
        return line


def _png_text(task: ImageTask, settings: Settings) -> PngInfo:
    """Return the text inside the PNG. It does not name the model, because a judge may see the file."""
    text = PngInfo()
    values = {"prompt": task.prompt.text, "seed": task.seed, "steps": settings.steps, "guidance": settings.guidance}
    for name, value in values.items():
        text.add_itxt(name, str(value))
    return text


def as_drawn(lines: Sequence[Line]) -> dict[str, DrawnImage]:
    """Return recorded images by path; of several lines of a path the last one counts."""
    names = Look.__dataclass_fields__
    return {
        line["path"]: DrawnImage(line["sha256"], Look(**{name: float(line[name]) for name in names})) for line in lines
    }


def verified_images(
    out: Path, tasks: Sequence[ImageTask], *, rank: int, world_size: int, say: Say
) -> dict[str, DrawnImage]:
    """Return those images of the tasks that are on the disk as they were recorded; the same on all ranks.

    Each rank reads its share of the files. One that is missing or damaged is named in a line. One collective.
    """
    recorded = as_drawn([*read_lines(out / IMAGES_NAME, needs=NEEDED, say=say)])
    wanted = [task.path for task in tasks if task.path in recorded]
    share = share_of(wanted, rank=rank, world_size=world_size)
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        digests = threads.map(lambda path: _sha256(out / path), share)
        bad = [path for path, digest in zip(share, digests, strict=True) if digest != recorded[path].sha256]
    lost = {path for of_rank in gather_objects(bad) for path in of_rank}
    if lost:
        say(f"{len(lost)} image(s) are missing or damaged and are drawn again; the first: {out / min(lost)}")
    return {path: recorded[path] for path in wanted if path not in lost}


def missing_batches(
    batches: Sequence[Sequence[ImageTask]], known: Mapping[str, DrawnImage]
) -> list[Sequence[ImageTask]]:
    """Return the batches of which at least one image is not known."""
    return [batch for batch in batches if any(task.path not in known for task in batch)]


def _sha256(path: Path) -> str | None:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
