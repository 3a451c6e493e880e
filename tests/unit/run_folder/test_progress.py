"""Progress in words: exact texts, and a time left that one slow step does not change."""

import pytest

from ds_dpo.run_folder.progress import Length, Pace, duration_text, progress_text

DURATIONS = {
    0.2: "0 s",
    45: "45 s",
    59.4: "59 s",
    59.6: "1 min",
    12 * 60 + 20: "12 min",
    59 * 60 + 40: "1 h 0 min",
    3 * 3600 + 12 * 60: "3 h 12 min",
    24 * 3600 - 20: "1 d 0 h",
    53 * 3600 + 100: "2 d 5 h",
}


@pytest.mark.parametrize("seconds", DURATIONS)
def test_a_duration_is_its_two_largest_units(seconds: float) -> None:
    assert duration_text(seconds) == DURATIONS[seconds]


def test_the_time_left_is_the_median_of_steps_times_their_number() -> None:
    pace = Pace()
    pace.add(600)  # the first step compiles kernels
    assert pace.seconds_left(10) is None
    for seconds in (2, 3, 500, 4, 3):
        pace.add(seconds)
    assert pace.seconds_left(10) == 30
    for _ in range(50):
        pace.add(7)
    assert pace.seconds_left(10) == 70, "the last 50 steps count"


@pytest.mark.parametrize(
    ("step", "pairs_seen", "num_pairs", "seconds_left", "text"),
    [
        (120, 1920, 4571, 11520, "step  120/2000  epoch 0.42  eta 3 h 12 min"),
        (1, 16, 4571, None, "step    1/2000  epoch 0.00"),
        (2000, 32000, 16000, 0, "step 2000/2000  epoch 2.00"),
        (7, None, 4571, 59, "step    7/2000  eta 59 s"),
        (7, 112, None, 59, "step    7/2000  eta 59 s"),
    ],
)
def test_progress_in_words(
    step: int, pairs_seen: int | None, num_pairs: int | None, seconds_left: float | None, text: str
) -> None:
    length = Length(max_train_steps=2000, num_pairs=num_pairs)
    assert progress_text(length, step=step, pairs_seen=pairs_seen, seconds_left=seconds_left) == text
