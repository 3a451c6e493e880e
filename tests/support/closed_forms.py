"""Each objective's closed form, written out with `math`, and the options with which the tests try it.

Every row of OBJECTIVES needs a row in CLOSED_FORMS. A closed form takes one pair's numbers and returns its loss and
the loss's derivatives by the fields of PairErrors; what is not named has none.
"""

from collections.abc import Callable
from math import exp, log
from typing import Any

from pairs_of_numbers import Pair

from ds_dpo.config.objectives import OBJECTIVE_SECTIONS
from ds_dpo.objectives.kto_utilities import UTILITIES

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


def closed_poly(pair: Pair, beta: float, poly_weight: float = 1.0) -> tuple[float, dict[str, float]]:
    u, p = -beta / 2 * (pair.d_w - pair.d_l), pair.target
    s = sigma(u)
    value = p * (-log(s) + poly_weight * (1 - s)) + (1 - p) * (-log(1 - s) + poly_weight * s)
    return value, by_gap(beta, s - p + poly_weight * s * (1 - s) * (1 - 2 * p))


def closed_alpha(
    pair: Pair, beta: float, alpha_scale: float = 0.9999, mean_probability: float = 0.5
) -> tuple[float, dict[str, float]]:
    u, a = -beta / 2 * (pair.d_w - pair.d_l), alpha_scale * mean_probability

    def divergence(s: float) -> tuple[float, float]:
        """The authors' line, and its derivative by s."""
        return 1 / (a * (a - 1)) * (s**a - (1 - a) - a * s), (s ** (a - 1) - 1) / (a - 1)

    s, p = sigma(u), pair.target
    (right, right_slope), (wrong, wrong_slope) = divergence(s), divergence(sigma(-u))
    value = p * right + (1 - p) * wrong
    return value, by_gap(beta, s * (1 - s) * (p * right_slope - (1 - p) * wrong_slope))


def closed_linear(pair: Pair, beta: float, eta: float = 0.001) -> tuple[float, dict[str, float]]:
    of_label, of_swapped = (
        min(1 - eta, max(eta, 0.5 + 0.2 * beta * gap)) for gap in (pair.d_w - pair.d_l, pair.d_l - pair.d_w)
    )
    weight = pair.target * of_label - (1 - pair.target) * of_swapped
    return weight * (pair.m_w - pair.m_l), {"policy_chosen_error": weight, "policy_rejected_error": -weight}


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
    "poly": (closed_poly, [{"beta": 500.0}, {"beta": 500.0, "poly_weight": -1.0}, {"beta": 1.0, "poly_weight": 3.0}]),
    "alpha": (
        closed_alpha,
        [
            {"beta": 500.0},
            {"beta": 500.0, "mean_probability": 0.05},
            {"beta": 500.0, "mean_probability": 0.99},
            {"beta": 50.0, "alpha_scale": 0.7, "mean_probability": 1.0},
        ],
    ),
    "linear": (closed_linear, [{"beta": 500.0}, {"beta": 100.0, "eta": 0.0}, {"beta": 500.0, "eta": 0.2}]),
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
# their gradients are not those of their values, on purpose
HOLDING_BACK_GRADIENTS = ("sdpo", "linear")
CASES = [(name, options) for name, (_, cases) in CLOSED_FORMS.items() for options in cases]
TAKING_SOFT_TARGETS = [name for name, section in OBJECTIVE_SECTIONS.items() if section.takes_soft_targets]
