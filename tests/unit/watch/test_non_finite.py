"""The watch over steps that could not be applied: what counts, what ends a run, and what the record tells."""

import json
import math

import pytest
import torch

from ds_dpo.checkpoints.identity import RunIdentity
from ds_dpo.data.stream.order import PairOrder
from ds_dpo.engine.settings_file import read_deepspeed_file
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.step.record import read_record
from ds_dpo.watch.non_finite import NonFiniteWatch, RunFacts

NAN, INF = float("nan"), float("inf")
FINE = {"loss": 0.7, "gradient_norm": 1.0}
BAD_GRADIENT = {"loss": 0.7}
BAD_LOSS = {"loss": NAN, "beta": 4.0}


class Run:
    """A watch, and the loss scale that it reads."""

    def __init__(self, folder, *, limit=3, scale=None, least=None):
        self.folder, self.scale, self.said = folder, scale, []
        identity = RunIdentity(world_size=1, stage=2, precision="fp16", fingerprint="f")
        order = PairOrder([5], pairs_per_step=4, seed=7)
        self.watch = NonFiniteWatch(
            max_steps_in_a_row=limit,
            loss_scale=lambda: self.scale,
            least_loss_scale=least,
            facts=RunFacts(identity=identity, order=order, seed=7, pairs_per_step=4, micro_batch_pairs=2),
            run=folder,
            say=self.said.append,
        )

    def step(self, number, metrics, losses=(1.0, 1.0, 1.0, 1.0)):
        for first in (0, 2):
            ids = torch.tensor([100 * number + first, 100 * number + first + 1])
            quantities = {"loss": torch.tensor(losses[first : first + 2])}
            self.watch.before_backward(ids, ids % 7, quantities)
        # the scale that the step used is that of before it
        used, self.scale = self.scale, None if self.scale is None else self.scale / 2
        assert self.watch.after_step(number, {**metrics, "pairs_seen": 4 * number}) == {}
        self.scale = used
        return self.watch.take_error()


def test_a_row_ends_the_run_at_its_last_step_and_a_fine_step_ends_the_row(tmp_path):
    run = Run(tmp_path)
    steps = [BAD_LOSS, BAD_GRADIENT, FINE, BAD_LOSS, BAD_LOSS]
    assert [run.step(number, metrics) for number, metrics in enumerate(steps, start=1)] == [None] * 5
    error = run.step(6, BAD_GRADIENT)
    assert error is not None
    assert run.watch.take_error() is None, "once"
    assert [line.partition(":")[0] for line in run.said] == ["step 1", "step 2", "step 4", "step 5", "step 6"]
    assert run.said[0] == "step 1: loss is nan, which is not finite; update skipped, 1 in a row"
    assert run.said[-1] == "step 6: gradients are not finite; update skipped, 3 in a row"


def test_without_a_limit_nothing_ends_the_run(tmp_path):
    run = Run(tmp_path, limit=None)
    assert [run.step(number, BAD_LOSS) for number in range(1, 30)] == [None] * 29
    assert not (tmp_path / "non_finite").exists()


def test_search_for_a_loss_scale_neither_counts_nor_ends_a_row(tmp_path):
    run = Run(tmp_path, limit=2, scale=65536.0, least=1.0)
    assert [run.step(number, BAD_GRADIENT) for number in range(1, 20)] == [None] * 19
    assert run.said[0] == "step 1: gradients overflowed at loss scale 65536; update skipped"
    assert run.step(20, BAD_LOSS) is None, "no scale makes a loss finite"
    assert run.step(21, BAD_GRADIENT) is None
    assert run.step(22, BAD_LOSS) is not None


@pytest.mark.parametrize(("scale", "least"), [(1.0, 1.0), (128.0, None), (None, None)])
def test_where_no_lower_scale_can_help_every_step_counts(tmp_path, scale, least):
    run = Run(tmp_path, limit=2, scale=scale, least=least)
    assert run.step(1, BAD_GRADIENT) is None
    assert run.step(2, BAD_GRADIENT) is not None


def test_the_row_goes_on_after_a_resume(tmp_path):
    first, second = Run(tmp_path), Run(tmp_path)
    for number in (1, 2):
        first.step(number, BAD_LOSS)
    second.watch.restore(json.loads(json.dumps(first.watch.state())), tmp_path)
    assert second.step(3, BAD_LOSS) is not None


def test_record_tells_pairs_draws_and_losses(tmp_path):
    run = Run(tmp_path, limit=1, scale=8.0, least=8.0)
    error = run.step(3, BAD_LOSS, losses=(1.0, NAN, -INF, 2.0))
    path = tmp_path / "non_finite" / "step_00000003.json"
    assert "the loss of pair 301, 302 is not finite" in str(error)
    assert str(error).endswith(f"python scripts/replay.py {path}")
    json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    record = read_record(path)
    assert [pair.pair_id for pair in record.pairs] == [300, 301, 302, 303]
    assert [pair.timestep for pair in record.pairs] == [300 % 7, 301 % 7, 302 % 7, 303 % 7]
    # step 3 of 4 pairs each takes positions 8..11 of 5 pairs an epoch: 8 and 9 end the second, 10 begins the third
    assert [pair.position for pair in record.pairs] == [8, 9, 10, 11]
    assert [pair.visit for pair in record.pairs] == [1, 1, 2, 2]
    losses = [pair.loss for pair in record.pairs]
    assert (losses[0], losses[2:], math.isnan(losses[1])) == (1.0, [-INF, 2.0], True)
    assert (record.loss_scale, record.options, record.pairs_seen) == (8.0, {"beta": 4.0}, 8)
    assert record.checkpoint == "step_00000003"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "step": 3}'])
def test_what_is_no_record_is_refused_by_name(tmp_path, text):
    (tmp_path / "step.json").write_text(text)
    with pytest.raises(DataError, match=r"step\.json: not the record of a step"):
        read_record(tmp_path / "step.json")


def test_an_update_that_is_not_finite_cannot_be_asked_for(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true, "check_grad_overflow": false}}')
    with pytest.raises(ConfigError, match="check_grad_overflow = False: updates with gradients that are not finite"):
        read_deepspeed_file(path)
