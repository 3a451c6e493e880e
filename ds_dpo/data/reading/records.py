"""Read a pair of a row: its prompt, its two undecoded images, its name and its id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dpo.data.keyed_hash import id_of
from ds_dpo.data.reading.arrow_values import Unreadable
from ds_dpo.data.reading.image_files import raw_image
from ds_dpo.data.reading.pair_identity import IMAGE_ROLES, pair_identity
from ds_dpo.data.reading.rows import RowReader
from ds_dpo.data.selection.formats import Columns
from ds_dpo.data.source import BadRowError, PairRecord, RawImage
from ds_dpo.errors import DataError

ROLES_NOT_IN_METADATA = frozenset({"prompt", "image_0", "image_1", "chosen", "rejected", "images"})


@dataclass(frozen=True, kw_only=True)
class RecordReader:
    """Reads pairs of one dataset. read_row: returns the columns named by `columns`. name: of the dataset and split."""

    read_row: RowReader
    columns: Columns
    grouped: bool
    name: str
    find_file: Callable[[str], Path]

    def read(self, *, row: int, first: int, second: int, target: float, weight: float) -> PairRecord:
        """Return the pair in a row whose image number `first` is chosen and number `second` is rejected.

        Raises BadRowError if the prompt is not text, an image is missing, or ranks and images differ in number.
        """
        values = self._values(row)
        uid, id_text = self._identity(values, row, first, second)
        self._require_a_verdict_on_each_image(values, uid)
        prompt = values["prompt"]
        if isinstance(prompt, Unreadable):
            raise BadRowError(uid, f"{self.columns.of_role['prompt']}: {prompt.reason}")
        if not isinstance(prompt, str):
            raise BadRowError(uid, f"{self.columns.of_role['prompt']}: {type(prompt).__name__} instead of text")
        return PairRecord(
            prompt=prompt,
            chosen=self._image(values, row, first, uid),
            rejected=self._image(values, row, second, uid),
            pair_id=id_of(id_text),
            uid=uid,
            target_probability=target,
            weight=weight,
            image_numbers=(first, second),
            metadata={
                role: value
                for role, value in values.items()
                if role not in ROLES_NOT_IN_METADATA and value is not None and not isinstance(value, Unreadable)
            },
        )

    def images(self, *, row: int, first: int, second: int) -> tuple[RawImage, RawImage]:
        """Return the two images alone. Raises BadRowError as `read` does for images."""
        values = self._values(row)
        uid, _ = self._identity(values, row, first, second)
        self._require_a_verdict_on_each_image(values, uid)
        return self._image(values, row, first, uid), self._image(values, row, second, uid)

    def _values(self, row: int) -> dict[str, Any]:
        values = self.read_row(row)
        return {role: values[column] for role, column in self.columns.of_role.items()}

    def _identity(self, values: Mapping[str, Any], row: int, first: int, second: int) -> tuple[str, str]:
        return pair_identity(values, self.columns, row=row, first=first, second=second, name=self.name)

    def lacks_verdicts(self, row: int) -> bool:
        """Return whether a row's list of images is longer than that of its ranks, or cannot be read."""
        values = self._values(row)
        images = values["images"] or []
        return isinstance(images, Unreadable) or len(images) > len(values[self.columns.layout] or [])

    def _require_a_verdict_on_each_image(self, values: Mapping[str, Any], uid: str) -> None:
        """Raise BadRowError if a row's list of ranks, scores or preferences does not fit its list of images."""
        layout = self.columns.layout
        if layout in IMAGE_ROLES or self.grouped:
            return
        images, verdicts = values["images"] or [], values[layout] or []
        if isinstance(images, Unreadable):
            return  # reading an image says what is wrong with the list
        if len(images) != len(verdicts):
            names = self.columns.of_role["images"], self.columns.of_role[layout]
            raise BadRowError(uid, f"{names[0]} has {len(images)} images, and {names[1]} has {len(verdicts)} values")

    def _image(self, values: Mapping[str, Any], row: int, number: int, uid: str) -> RawImage:
        try:
            return raw_image(self._image_value(values, row, number), self.find_file)
        except DataError as error:
            raise BadRowError(uid, f"{self._image_name(number)}: {error}") from error

    def _image_value(self, values: Mapping[str, Any], row: int, number: int) -> Any:
        if (roles := IMAGE_ROLES.get(self.columns.layout)) is not None:
            return values[roles[number]]
        if self.grouped:
            return (values if number == 0 else self._values(row + number))["images"]
        images = values["images"] or []
        if isinstance(images, Unreadable):
            return images
        if number >= len(images):
            raise DataError(f"missing: the row has {len(images)} images")
        return images[number]

    def _image_name(self, number: int) -> str:
        roles = IMAGE_ROLES.get(self.columns.layout)
        return f"image {number}" if roles is None else self.columns.of_role[roles[number]]
