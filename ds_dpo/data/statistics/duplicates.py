"""Find repetitions among pairs, from 16-byte digests of their prompts and images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16
DIGEST_TYPE = np.dtype(f"S{DIGEST_BYTES}")
Digests = NDArray[np.bytes_]
Places = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Repetitions among pairs. A pair is named by its place in the given arrays.

    pairs_of_one_image: pairs whose two images are the same file. pairs_per_image: for each distinct image.
    repeated_pairs: pairs with the prompt, images and winner of an earlier pair. contradictions: (N, 2), for each
    question (a prompt and two images) that both images won: the first place where one won, and where the other did.
    contradicting_pairs: number of all pairs of such questions, without ties.
    """

    pairs_of_one_image: Places
    pairs_per_image: Places
    repeated_pairs: Places
    contradictions: Places
    contradicting_pairs: int


def find_duplicates(*, prompts: Digests, chosen: Digests, rejected: Digests, winners: NDArray[np.int8]) -> Duplicates:
    """Compare all pairs with each other, by sorting. winners: 1 the chosen image, -1 the rejected one, 0 neither."""
    num_pairs = len(chosen)
    image_ids = np.unique(np.concatenate([chosen, rejected]), return_inverse=True)[1].astype(np.int64)
    first, second = image_ids[:num_pairs], image_ids[num_pairs:]
    is_one_image = first == second
    questions = _question_ids(prompts, first, second)
    # an image that is compared with itself has no winner to contradict
    directions = np.where(is_one_image, 0, np.where(first < second, winners, -winners))
    contradictions, contradicting_pairs = _contradictions(questions, directions)
    answers = questions * 3 + directions
    return Duplicates(
        pairs_of_one_image=np.flatnonzero(is_one_image),
        pairs_per_image=np.bincount(np.concatenate([first, second[~is_one_image]])),
        repeated_pairs=np.setdiff1d(np.arange(num_pairs), np.unique(answers, return_index=True)[1]),
        contradictions=contradictions,
        contradicting_pairs=contradicting_pairs,
    )


def _question_ids(prompts: Digests, first: Places, second: Places) -> Places:
    """Return a number for each pair; pairs with the same prompt and the same two images, in any order, share it."""
    prompt_ids = np.unique(prompts, return_inverse=True)[1].astype(np.int64)
    lower, upper = np.minimum(first, second), np.maximum(first, second)
    # products of two counts: below 2**63 for 10**9 pairs
    both = np.unique(lower * (2 * len(first)) + upper, return_inverse=True)[1].astype(np.int64)
    return np.unique(both * len(first) + prompt_ids, return_inverse=True)[1].astype(np.int64)


def _contradictions(questions: Places, directions: NDArray[np.int8]) -> tuple[Places, int]:
    forward, backward = np.flatnonzero(directions > 0), np.flatnonzero(directions < 0)
    asked_forward, first_forward = np.unique(questions[forward], return_index=True)
    asked_backward, first_backward = np.unique(questions[backward], return_index=True)
    both, in_forward, in_backward = np.intersect1d(
        asked_forward, asked_backward, assume_unique=True, return_indices=True
    )
    places = np.stack([forward[first_forward[in_forward]], backward[first_backward[in_backward]]], axis=1)
    return np.sort(places, axis=1), int(np.count_nonzero(np.isin(questions, both) & (directions != 0)))
