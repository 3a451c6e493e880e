"""Labels of pairs from a file of their own, such as those of a reward model: they take the place of a data set's.

Legend: L labels, C candidates. Of a pair's two images, the lower one has the lower number in the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ds_dpo.data.selection.candidates import Candidates


@dataclass(frozen=True, kw_only=True)
class PairLabels:
    """Labels by pair, sorted by id.

    ids: (L,) int64, pair ids, each once. labels: (L,) float64: 1 if the lower image is the better one, 0 if the higher
    one is, 0.5 for a tie. probabilities: (L,) float64 in 0..1, that the lower image is the better one; NaN if unknown.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.float64]
    probabilities: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)

    def apply(self, candidates: Candidates, ids: NDArray[np.int64]) -> Candidates:
        """Return the candidates that have a label, with its verdict as theirs. ids: (C,), their pair ids.

        The probability that the better image wins becomes their confidence.
        """
        if not len(self):
            return candidates.keep(np.zeros(len(candidates), bool))
        place = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        has_label = self.ids[place] == ids
        place, kept = place[has_label], candidates.keep(has_label)
        lower, higher = np.minimum(kept.first, kept.second), np.maximum(kept.first, kept.second)
        label, probability = self.labels[place], self.probabilities[place]
        is_lower_better = label >= 0.5
        return Candidates(
            row=kept.row,
            first=np.where(is_lower_better, lower, higher),
            second=np.where(is_lower_better, higher, lower),
            is_tie=label == 0.5,
            confidence=np.where(is_lower_better, probability, 1 - probability),
        )
