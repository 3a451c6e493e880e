"""A share of a data set's prompts, held out with all their pairs: a formula of the prompt's text decides.

Legend: R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ds_dpo.data.selection.candidates import codes_of

KEY = b"held_out.share"
PLACES = 2**64


@dataclass(frozen=True, kw_only=True)
class PromptShare:
    """One side of a data set that is divided by prompt. share: of the prompts, above 0 and below 1, is held out."""

    share: float
    side: Literal["trained_on", "held_out"]

    @property
    def count_name(self) -> str:
        """Name of the count of pairs on the other side."""
        return "dropped_held_out" if self.side == "trained_on" else "dropped_trained_on"

    def rows(self, prompts: pa.ChunkedArray) -> NDArray[np.bool_]:
        """Return which rows are on this side, (R,); a row without a prompt is never held out."""
        if pa.types.is_dictionary(prompts.type):
            prompts = prompts.cast(prompts.type.value_type)
        codes = codes_of(prompts)
        first_row = np.unique(codes, return_index=True)[1]
        distinct = prompts.take(pa.array(first_row)).combine_chunks()
        # as bytes: a prompt that is not UTF-8 is a bad row when it is read, and no error here
        texts = distinct.cast(pa.large_binary()).to_pylist()
        held_out = np.array([text is not None and is_held_out(text, self.share) for text in texts], dtype=bool)
        return held_out[codes] == (self.side == "held_out")


def is_held_out(prompt: bytes, share: float) -> bool:
    """Return whether a prompt, as UTF-8, is held out.

    A keyed hash of the text gives its place in [0, 1), and the prompts below the share are held out. So a larger share
    holds out more prompts beside the same ones, in any order of rows, and whatever other prompts there are.
    Source: RFC 7693 (BLAKE2b, with a key, 8 bytes, read as a little-endian integer).
    """
    place = int.from_bytes(blake2b(prompt, digest_size=8, key=KEY).digest(), "little")
    return place < share * PLACES
