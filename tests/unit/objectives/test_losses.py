"""Objectives against closed forms written out with `math`, their gradients against derivatives taken by hand.

Every row of OBJECTIVES needs a row in CLOSED_FORMS. A closed form takes one pair's numbers and returns its loss and
the loss's derivatives by the fields of PairErrors; what is not named has none.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_dpo.config.objectives import OBJECTIVE_SECTIONS
from ds_dpo.objectives.kto_utilities import UTILITIES
from ds_dpo.objectives.losses import OBJECTIVES, anchor, dpo, orpo, sft, with_terms
from ds_dpo.objectives.pair_errors import PairErrors

FIELDS = (
    "policy_chosen_error",
    "policy_rejected_error",
    "chosen_difference",
    "rejected_difference",
    "residual_product",
    "chosen_distance",
    "rejected_distance",
)


@dataclass(frozen=True)
class Pair:
    """One pair's numbers: errors m, differences d, distances s of the chosen (w) and the rejected (l) image."""

    m_w: float
    m_l: float
    d_w: float
    d_l: float
    residual_product: float
    s_w: float
    s_l: float
    target: float = 1.0

    def fields(self) -> dict[str, float]:
        values = (self.m_w, self.m_l, self.d_w, self.d_l, self.residual_product, self.s_w, self.s_l)
        return dict(zip(FIELDS, values, strict=True))

    def swapped(self) -> "Pair":
        return Pair(self.m_l, self.m_w, self.d_l, self.d_w, self.residual_product, self.s_l, self.s_w, self.target)


ClosedForm = Callable[..., tuple[float, dict[str, float]]]


def sigma(x: float) -> float:
    return 1 / (1 + exp(-x))


def by_gap(beta: float, slope: float) -> dict[str, float]:
    """The derivatives of what depends on u = -beta/2 (d_w - d_l) alone, from its derivative by u."""
    return {"chosen_difference": -beta / 2 * slope, "rejected_difference": beta / 2 * slope}


def closed_dpo(pair: Pair, beta: float, label_smoothing: float = 0.0) -> tuple[float, dict[str, float]]:
    u = -beta / 2 * (pair.d_w - pair.d_l)
    right = pair.target * (1 - label_smoothing) + (1 - pair.target) * label_smoothing
    value = -right * log(sigma(u)) - (1 - right) * log(sigma(-u))
    return value, by_gap(beta, sigma(u) - right)


def closed_ipo(pair: Pair, beta: float) -> tuple[float, dict[str, float]]:
    u, p = -beta / 2 * (pair.d_w - pair.d_l), pair.target
    return p * (u - 0.5) ** 2 + (1 - p) * (u + 0.5) ** 2, by_gap(beta, 2 * u - (2 * p - 1))


def closed_hinge(pair: Pair, beta: float) -> tuple[float, dict[str, float]]:
    u, p = -beta / 2 * (pair.d_w - pair.d_l), pair.target
    return p * max(0, 1 - u) + (1 - p) * max(0, 1 + u), by_gap(beta, -p * (u < 1) + (1 - p) * (u > -1))


def closed_dmpo(pair: Pair, beta: float, alpha: float = 0.01) -> tuple[float, dict[str, float]]:
    u = -beta / 2 * (pair.d_w - pair.d_l)
    q = pair.target * (1 - alpha) + (1 - pair.target) * alpha
    s = sigma(u)
    value = s * log(s / q) + (1 - s) * log((1 - s) / (1 - q))
    return value, by_gap(beta, s * (1 - s) * (u - log(q / (1 - q))))


def closed_sdpo(pair: Pair, beta: float, mu: float = 0.6) -> tuple[float, dict[str, float]]:
    value, slopes = closed_dpo(pair, beta)
    kept = 1.0
    if pair.residual_product > 0:
        kept = min(1.0, (1 - mu) * pair.m_w / pair.residual_product)
    return value, {**slopes, "rejected_difference": kept * slopes["rejected_difference"]}


# of each utility: its value and its derivative by x; s is the judgement
CLOSED_UTILITIES: dict[str, Callable[[float, int], tuple[float, float]]] = {
    "sigmoid": lambda x, s: (sigma(s * x), s * sigma(s * x) * (1 - sigma(s * x))),
    "loss_averse": lambda x, s: (log(sigma(s * x)), s * (1 - sigma(s * x))),
    "risk_seeking_1": lambda x, s: (s * log(1 + exp(x)), s * sigma(x)),
    "risk_seeking_2": lambda x, s: (s * exp(x / 100) - 1, s * exp(x / 100) / 100),
    "risk_seeking_3": lambda x, s: (log(1 + exp(s * x)), s * sigma(s * x)),
}


def closed_kto(
    pair: Pair,
    beta: float,
    utility: str = "sigmoid",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    baseline: float = 0.0,
) -> tuple[float, dict[str, float]]:
    (chosen, chosen_slope), (rejected, rejected_slope) = (
        CLOSED_UTILITIES[utility](beta / 2 * (-difference - baseline), judgement)
        for difference, judgement in ((pair.d_w, 1), (pair.d_l, -1))
    )
    value = (desirable_weight * (1 - chosen) + undesirable_weight * (1 - rejected)) / 2
    return value, {
        "chosen_difference": desirable_weight / 2 * chosen_slope * beta / 2,
        "rejected_difference": undesirable_weight / 2 * rejected_slope * beta / 2,
    }


def closed_mapo(
    pair: Pair, ratio_weight: float = 0.1, snr_value: float = 0.5, score_scale: float = 1000.0
) -> tuple[float, dict[str, float]]:
    def score(m: float) -> tuple[float, float]:
        x = snr_value * m
        grown = exp(x) - 1
        return x / grown, snr_value * (grown - x * exp(x)) / grown**2

    (f_w, slope_w), (f_l, slope_l) = score(pair.m_w), score(pair.m_l)
    v = score_scale * (f_w - f_l)
    by_score = -ratio_weight * score_scale * (1 - sigma(v))
    return pair.m_w - ratio_weight * log(sigma(v)), {
        "policy_chosen_error": 1 + by_score * slope_w,
        "policy_rejected_error": -by_score * slope_l,
    }


def closed_orpo(pair: Pair, ratio_weight: float = 0.1) -> tuple[float, dict[str, float]]:
    v = pair.m_l - pair.m_w
    pull = ratio_weight * (1 - sigma(v))
    return pair.m_w - ratio_weight * log(sigma(v)), {
        "policy_chosen_error": 1 + pull,
        "policy_rejected_error": -pull,
    }


def closed_dspo(pair: Pair, beta: float, shift: float | None = None) -> tuple[float, dict[str, float]]:
    most = beta if shift is None else shift
    u = -beta / 2 * (pair.d_w - pair.d_l)
    c = most * (1 - sigma(u))
    by_c = -(pair.d_w + pair.s_w) + 2 * c * pair.s_w
    through_c = by_gap(beta, -most * sigma(u) * (1 - sigma(u)) * by_c)
    return pair.m_w - c * (pair.d_w + pair.s_w) + c**2 * pair.s_w, {
        "policy_chosen_error": 1.0,
        "chosen_difference": -c + through_c["chosen_difference"],
        "rejected_difference": through_c["rejected_difference"],
        "chosen_distance": -c + c**2,
    }


def closed_sft(pair: Pair) -> tuple[float, dict[str, float]]:
    return pair.m_w, {"policy_chosen_error": 1.0}


CLOSED_FORMS: dict[str, tuple[ClosedForm, list[dict[str, Any]]]] = {
    "dpo": (closed_dpo, [{"beta": 1.0}, {"beta": 5000.0}, {"beta": 500.0, "label_smoothing": 0.2}]),
    "ipo": (closed_ipo, [{"beta": 1.0}, {"beta": 500.0}]),
    "hinge": (closed_hinge, [{"beta": 1.0}, {"beta": 500.0}]),
    "dmpo": (closed_dmpo, [{"beta": 500.0}, {"beta": 500.0, "alpha": 0.2}]),
    "sdpo": (closed_sdpo, [{"beta": 500.0}, {"beta": 500.0, "mu": 0.0}, {"beta": 500.0, "mu": 1.0}]),
    "kto": (
        closed_kto,
        [
            {
                "beta": 500.0,
                "utility": utility,
                "desirable_weight": 1.5,
                "undesirable_weight": 0.5,
                "baseline": 0.003,
            }
            for utility in UTILITIES
        ],
    ),
    "mapo": (closed_mapo, [{}, {"ratio_weight": 0.5, "snr_value": 2.0, "score_scale": 10.0}]),
    "orpo": (closed_orpo, [{}, {"ratio_weight": 2.0}]),
    "dspo": (closed_dspo, [{"beta": 0.001}, {"beta": 500.0, "shift": 0.3}]),
    "sft": (closed_sft, [{}]),
}
CASES = [(name, options) for name, (_, cases) in CLOSED_FORMS.items() for options in cases]
TAKING_SOFT_TARGETS = [name for name, section in OBJECTIVE_SECTIONS.items() if section.takes_soft_targets]


def some_pairs(number: int = 30, *, target: float = 1.0) -> list[Pair]:
    """Errors of usual sizes, and one pair in five of large ones; residuals that agree, oppose, and differ in size."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for index in range(number):
        m_w, m_l, s_w, s_l = (
            torch.rand(4, generator=generator, dtype=torch.float64) * (0.2, 3.0)[index % 5 == 4]
        ).tolist()
        d_w, d_l = (torch.randn(2, generator=generator, dtype=torch.float64) * 0.01).tolist()
        cosine = torch.rand((), generator=generator, dtype=torch.float64).item() * 2 - 1
        pairs.append(Pair(m_w, m_l, d_w, d_l, cosine * math.sqrt(m_w * m_l), s_w, s_l, target))
    return pairs


def as_errors(pairs: list[Pair], *, dtype: torch.dtype = torch.float64, with_gradient: bool = True) -> PairErrors:
    columns = {
        name: torch.tensor([pair.fields()[name] for pair in pairs], dtype=dtype, requires_grad=with_gradient)
        for name in FIELDS
    }
    return of_columns(columns, target=torch.tensor([pair.target for pair in pairs], dtype=dtype))


def of_columns(columns: dict[str, Tensor], *, target: Tensor | None = None) -> PairErrors:
    chosen = columns["policy_chosen_error"]
    return PairErrors(
        policy_chosen_error=chosen,
        target_probability=torch.ones_like(chosen) if target is None else target,
        asked_for={name: value for name, value in columns.items() if name != "policy_chosen_error"},  # type: ignore[misc]
    )


def gradients(loss: Tensor, errors: PairErrors) -> dict[str, Tensor]:
    held = [getattr(errors, name) for name in FIELDS]
    found = torch.autograd.grad(loss.sum(), held, allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for name, value, gradient in zip(FIELDS, held, found, strict=True)
    }


def losses(name: str, pairs: list[Pair], options: dict[str, Any]) -> list[float]:
    return OBJECTIVES[name].loss(as_errors(pairs, with_gradient=False), **options).tolist()


def test_every_objective_has_a_closed_form() -> None:
    assert CLOSED_FORMS.keys() == OBJECTIVES.keys()
    assert CLOSED_UTILITIES.keys() == UTILITIES.keys()
    assert UTILITIES.keys() == set(
        OBJECTIVE_SECTIONS["kto"].model_fields["utility"].annotation.__args__  # type: ignore[union-attr]
    )


@pytest.mark.parametrize(
    ("name", "options", "target"),
    [
        (name, options, target)
        for name, options in CASES
        for target in ((1.0, 0.5, 0.8) if name in TAKING_SOFT_TARGETS else (1.0,))
    ],
)
def test_values_and_gradients_are_those_of_the_closed_form(name: str, options: dict[str, Any], target: float) -> None:
    pairs = some_pairs(target=target)
    errors = as_errors(pairs)
    loss = OBJECTIVES[name].loss(errors, **options)
    assert loss.shape == (len(pairs),)
    found = gradients(loss, errors)
    for index, pair in enumerate(pairs):
        value, slopes = CLOSED_FORMS[name][0](pair, **options)
        assert loss[index].item() == pytest.approx(value, rel=1e-10, abs=1e-10)
        for field in FIELDS:
            assert found[field][index].item() == pytest.approx(slopes.get(field, 0.0), rel=1e-10, abs=1e-10), field


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "sdpo"])
def test_gradients_are_those_of_finite_differences(name: str, options: dict[str, Any]) -> None:
    """sdpo's is not its value's, on purpose: see its closed form."""
    columns = [getattr(as_errors(some_pairs(8)), field) for field in FIELDS]

    def loss(*values: Tensor) -> Tensor:
        return OBJECTIVES[name].loss(of_columns(dict(zip(FIELDS, values, strict=True))), **options)

    assert torch.autograd.gradcheck(loss, columns, eps=1e-7, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_each_pair_has_its_own_loss(name: str, options: dict[str, Any]) -> None:
    """The mean stands outside of all else: peers have had -logsigmoid(mean(...)), and one lambda for a batch."""
    first, second = some_pairs(2)
    pairs = as_errors([first, second])
    together = OBJECTIVES[name].loss(pairs, **options)
    apart = [as_errors([pair]) for pair in (first, second)]
    alone = [OBJECTIVES[name].loss(errors, **options) for errors in apart]
    assert together.tolist() == [loss.item() for loss in alone]
    assert together.mean().item() == pytest.approx(sum(loss.item() for loss in alone) / 2, rel=1e-14)
    found = gradients(together, pairs)
    own = [gradients(loss, errors) for loss, errors in zip(alone, apart, strict=True)]
    for field in FIELDS:
        assert found[field].tolist() == [gradient[field].item() for gradient in own]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_descent_lowers_the_chosen_error_and_raises_the_rejected(name: str, options: dict[str, Any]) -> None:
    # a little ahead on the chosen image, since dspo looks at the rejected one through the gap alone
    pair = Pair(m_w=0.12, m_l=0.10, d_w=-0.001, d_l=0.0, residual_product=-0.01, s_w=1e-5, s_l=1e-5)
    errors = as_errors([pair])
    found = gradients(OBJECTIVES[name].loss(errors, **options), errors)
    # a policy's error moves its difference by as much
    assert (found["policy_chosen_error"] + found["chosen_difference"]).item() > 0
    rejected = (found["policy_rejected_error"] + found["rejected_difference"]).item()
    assert rejected == 0 if name == "sft" else rejected < 0


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_loss_that_is_not_finite_passes_a_gradient_of_nan_on(name: str, options: dict[str, Any]) -> None:
    """Engine.backward_and_step relies on it: it gives such a loss a gradient of NaN, for every rank to see."""
    usual = some_pairs(1)[0].fields()
    num_tried = 0
    for field, poison in product(FIELDS, (math.nan, math.inf, -math.inf)):
        columns = {key: torch.tensor([value]).requires_grad_() for key, value in (usual | {field: poison}).items()}
        errors = of_columns(columns)
        loss = OBJECTIVES[name].loss(errors, **options)
        if not torch.isfinite(loss).all():
            num_tried += 1
            found = gradients(loss.mean() * math.nan, errors)
            assert any(bool(gradient.isnan().any()) for gradient in found.values()), (field, poison)
    assert num_tried > 0


EXTREMES = (-1e4, -1.0, 0.0, 1.0, 1e4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_extreme_inputs_give_finite_values_and_gradients(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    if "beta" in options:
        options = {**options, "beta": 1e5}
    pairs = [
        Pair(m_w, m_l, d_w, d_l, sign * math.sqrt(m_w * m_l), abs(d_w), abs(d_l))
        for d_w, d_l in product(EXTREMES, repeat=2)
        for m_w, m_l in product((0.0, 1e-30, 0.1, 1e4), repeat=2)
        for sign in (-1, 1)
    ]
    errors = as_errors(pairs, dtype=dtype)
    loss = OBJECTIVES[name].loss(errors, **options)
    assert loss.dtype == dtype
    assert loss.isfinite().all()
    for field, gradient in gradients(loss, errors).items():
        assert gradient.isfinite().all(), field
    kind = OBJECTIVES[name].quantities
    if kind is not None:
        assert all(values.isfinite().all() for values in kind(errors, **options).values())


def test_extremes_have_their_limits() -> None:
    ahead, behind = Pair(0, 0, -1e4, 1e4, 0, 0, 0), Pair(0, 0, 1e4, -1e4, 0, 0, 0)
    # u is +-1e9
    assert losses("dpo", [ahead, behind], {"beta": 1e5}) == [0, 1e9]
    assert losses("hinge", [ahead, behind], {"beta": 1e5}) == [0, 1 + 1e9]
    assert losses("dmpo", [ahead, behind], {"beta": 1e5, "alpha": 0.01}) == pytest.approx([-log(0.99), -log(0.01)])
    assert losses("kto", [ahead, behind], {"beta": 1e5}) == [0, 1]
    # an alpha that 1 - alpha loses in fp32
    behind_in_fp32 = as_errors([behind], dtype=torch.float32)
    assert OBJECTIVES["dmpo"].loss(behind_in_fp32, beta=1e5, alpha=1e-9).item() == pytest.approx(-log(1e-9), rel=1e-6)
    # beyond exponent 20 exp goes on as its tangent: here at 5e6
    tangent = exp(20) * (1 + 5e6 - 20)
    (found,) = losses("kto", [ahead], {"beta": 1e5, "utility": "risk_seeking_2", "undesirable_weight": 0.0})
    assert found == pytest.approx((2 - tangent) / 2, rel=1e-12)
    # one error far beyond the other: f is 0 of the one, 1 of the other
    assert losses("mapo", [Pair(0, 1e4, 0, 0, 0, 0, 0), Pair(1e4, 0, 0, 0, 0, 0, 0)], {}) == [0, 1e4 + 100]


# ---- uncertain labels ----


@pytest.mark.parametrize("name", TAKING_SOFT_TARGETS)
def test_a_tie_has_no_side_and_a_label_that_is_surely_wrong_is_the_swapped_pair_s(name: str) -> None:
    for options in CLOSED_FORMS[name][1]:
        ties = some_pairs(target=0.5)
        assert losses(name, ties, options) == pytest.approx(losses(name, [tie.swapped() for tie in ties], options))
        wrong = some_pairs(target=0.0)
        right = [replace(pair.swapped(), target=1.0) for pair in wrong]
        assert losses(name, wrong, options) == pytest.approx(losses(name, right, options), rel=1e-12)


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - set(TAKING_SOFT_TARGETS)))
def test_what_takes_no_soft_targets_does_not_read_them(name: str) -> None:
    options = CLOSED_FORMS[name][1][0]
    assert losses(name, some_pairs(target=0.5), options) == losses(name, some_pairs(), options)


def test_dpo_of_a_soft_target_by_hand() -> None:
    # logit 1: log sigmoid(1) = -log(1 + 1/e), log sigmoid(-1) = -log(1 + e)
    won, lost = log(1 + exp(-1)), log(1 + math.e)
    tie, likely = (Pair(0.1, 0.2, -0.001, 0.001, 0, 0, 0, target) for target in (0.5, 0.8))
    assert losses("dpo", [tie, likely], {"beta": 1000}) == pytest.approx(
        [(won + lost) / 2, 0.8 * won + 0.2 * lost], rel=1e-12
    )
    # a label that is right with 0.8 and smoothed by 0.1 is right with 0.8 x 0.9 + 0.2 x 0.1 = 0.74
    (smoothed,) = losses("dpo", [likely], {"beta": 1000, "label_smoothing": 0.1})
    assert smoothed == pytest.approx(0.74 * won + 0.26 * lost, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("dpo", {"label_smoothing": 0.1}, log(0.74 / 0.26)),
        ("dmpo", {"alpha": 0.1}, log(0.74 / 0.26)),
        ("ipo", {}, 0.8 - 0.5),
    ],
)
def test_an_uncertain_label_is_followed_as_far_as_it_is_certain(
    name: str, options: dict[str, float], least: float
) -> None:
    at_least = as_errors([Pair(0.1, 0.1, -2 * least / 1000, 0, 0, 0, 0, target=0.8)])
    found = gradients(OBJECTIVES[name].loss(at_least, beta=1000, **options), at_least)
    assert abs(found["chosen_difference"].item()) < 1e-10


# ---- single values ----


def test_the_first_losses_of_an_untrained_policy() -> None:
    start = Pair(0.12, 0.10, 0.0, 0.0, 0.05, 0.0, 0.0)
    values = {name: losses(name, [start], cases[0])[0] for name, (_, cases) in CLOSED_FORMS.items()}
    assert values["dpo"] == values["sdpo"] == pytest.approx(log(2), abs=1e-15)
    assert values["ipo"] == 0.25
    assert values["hinge"] == 1
    assert values["sft"] == values["dspo"] == 0.12
    assert values["dmpo"] == pytest.approx(0.5 * log(0.5 / 0.99) + 0.5 * log(0.5 / 0.01))
    (kto,) = losses("kto", [start], {"beta": 5000.0})
    assert kto == 0.5


def test_orpo_raises_the_rejected_error_where_diffusers_lowers_it() -> None:
    """At m_w 0.12, m_l 0.10 and weight 0.1 diffusers' form has the derivative +0.0495 by m_l."""
    errors = as_errors([Pair(0.12, 0.10, 0, 0, 0, 0, 0)])
    found = gradients(orpo(errors, ratio_weight=0.1), errors)
    assert found["policy_rejected_error"].item() == pytest.approx(-0.1 * sigma(0.02), rel=1e-12)
    assert found["policy_chosen_error"].item() == pytest.approx(1 + 0.1 * sigma(0.02), rel=1e-12)


def test_dpo_is_the_loss_of_the_swapped_pair_where_labels_are_smoothed() -> None:
    pair = Pair(0.1, 0.1, -0.001, 0.003, 0, 0, 0)
    own, swapped = (losses("dpo", [one], {"beta": 1000})[0] for one in (pair, pair.swapped()))
    (mixed,) = losses("dpo", [pair], {"beta": 1000, "label_smoothing": 0.1})
    assert mixed == pytest.approx(0.9 * own + 0.1 * swapped, rel=1e-12)


def test_sft_is_the_chosen_error_and_nothing_else() -> None:
    alone = PairErrors(policy_chosen_error=torch.tensor([0.25, 0.5]), target_probability=torch.ones(2))
    assert sft(alone).tolist() == [0.25, 0.5]


# ---- what a loss asks for ----


class Recorded(dict[Any, Tensor]):
    """Quantities that remember which of them were read."""

    def __init__(self, values: Mapping[Any, Tensor]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_asks_for_exactly_what_its_loss_reads(name: str) -> None:
    objective, options = OBJECTIVES[name], CLOSED_FORMS[name][1][-1]
    errors = as_errors(some_pairs(3))
    recorded = Recorded(errors.asked_for)
    objective.loss(replace(errors, asked_for=recorded), **options)
    read = recorded.read
    assert objective.uses_rejected == any("rejected" in one for one in read)
    assert objective.uses_reference == any("difference" in one or "distance" in one for one in read)
    assert (objective.reference == "predictions") == any("distance" in one for one in read)
    assert objective.uses_residual_product == ("residual_product" in read)
    if objective.quantities is not None:
        objective.quantities(replace(errors, asked_for=recorded), **options)
        assert recorded.read == read, "what a log shows costs no more"


def test_what_was_not_asked_for_is_named() -> None:
    errors = PairErrors(policy_chosen_error=torch.ones(1), target_probability=torch.ones(1))
    with pytest.raises(LookupError, match=r"chosen_difference was not computed; .* chosen errors alone"):
        dpo(errors, beta=1.0)
    compared = errors.with_quantity("chosen_difference", torch.zeros(1))
    with pytest.raises(LookupError, match=r"rejected_difference was not computed; .*\(computed: chosen_difference\)"):
        dpo(compared, beta=1.0)


def test_a_weight_acts_on_every_error_and_on_no_target() -> None:
    pair = Pair(1, 2, 3, 4, 5, 6, 7, target=0.5)
    weighted = as_errors([pair]).weighted(torch.tensor([0.5], dtype=torch.float64))
    assert [getattr(weighted, field).item() for field in FIELDS] == [0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert weighted.target_probability.item() == 0.5
    assert weighted.difference_gap.item() == -0.5


# ---- terms ----


def test_terms_add_to_value_and_gradient() -> None:
    pairs = some_pairs(5)
    plain, more = as_errors(pairs), as_errors(pairs)
    objective = with_terms(OBJECTIVES["dpo"], sft_weight=0.3, anchor_weight=0.7)
    alone, together = dpo(plain, beta=500), objective.loss(more, beta=500)
    by_hand = [0.3 * pair.m_w + 0.7 * (pair.s_w + pair.s_l) / 2 for pair in pairs]
    assert (together - alone).tolist() == pytest.approx(by_hand, rel=1e-10)
    own, found = gradients(alone, plain), gradients(together, more)
    added = {"policy_chosen_error": 0.3, "chosen_distance": 0.35, "rejected_distance": 0.35}
    for field in FIELDS:
        assert (found[field] - own[field]).tolist() == pytest.approx([added.get(field, 0.0)] * 5, abs=1e-12)


def test_terms_say_what_they_need() -> None:
    assert with_terms(OBJECTIVES["dpo"], sft_weight=0, anchor_weight=0) is OBJECTIVES["dpo"]
    assert with_terms(OBJECTIVES["dpo"], sft_weight=1, anchor_weight=0).reference == "errors"
    assert with_terms(OBJECTIVES["dpo"], sft_weight=0, anchor_weight=1).reference == "predictions"
    assert with_terms(OBJECTIVES["mapo"], sft_weight=1, anchor_weight=0).reference == "none"
    assert anchor(as_errors([Pair(0, 0, 0, 0, 0, 0.2, 0.4)])).item() == pytest.approx(0.3)
