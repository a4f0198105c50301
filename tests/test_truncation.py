"""What the second order leaves out: closed forms, dense scans, and simulated noise; each oracle has a bug that it catches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from interference import statistics, truncation
from interference.truncation import fit, reach, widened

Array = NDArray[np.float64]
ALPHAS = np.array([0.25, 0.5, 0.75, 1.0, 1.5])
NONE = np.zeros((2, len(ALPHAS)))


def rest(f: Callable[[Array], Array], slope: float, curvature: float, t: Array = ALPHAS) -> Array:
    """r(t) of a function with f(0) = 0."""
    return f(t) - slope * t - 0.5 * curvature * t * t


def test_cubic_and_quartic_are_recovered() -> None:
    value = -ALPHAS + 0.4 * ALPHAS**2 + 7 * ALPHAS**3 / 6 - 5 * ALPHAS**4 / 24  # third derivative 7, fourth -5
    found = fit(ALPHAS, rest(lambda _: value, -1.0, 0.8), NONE)
    assert found is not None
    assert (found.third, found.fourth, found.value) == pytest.approx((7 / 6, -5 / 24, 7 / 6 - 5 / 24))
    assert found.misfit == pytest.approx(5 / 24)
    assert found.third != pytest.approx(7.0)  # the planted bug: a derivative without its 1/6


def test_exp_is_extrapolated_within_its_own_misfit() -> None:
    found = fit(ALPHAS, rest(np.expm1, 1.0, 1.0), NONE)
    assert found is not None
    assert found.value == pytest.approx(np.e - 2.5, abs=found.misfit)
    assert found.value == pytest.approx(np.e - 2.5, rel=0.03)
    assert found.third == pytest.approx(1 / 6, rel=0.02)


def test_one_point_gives_the_third_order_alone_and_says_so_in_its_misfit() -> None:
    alphas = np.array([0.5, 1.0])
    found = fit(alphas, 3 * alphas**3 + alphas**4, np.zeros((2, 2)))
    assert found is not None
    assert (found.third, found.value, found.misfit, found.third_misfit) == pytest.approx((3.5,) * 4)
    assert np.isnan(found.fourth)
    assert fit(np.array([0.75, 1.0]), np.ones(2), np.zeros((2, 2))) is None


def test_negative_alphas_separate_the_orders() -> None:
    t = np.array([-0.5, -0.25, 0.25, 0.5])
    found = fit(t, 2 * t**3 - 6 * t**4 + 4 * t**5, np.zeros((2, 4)))
    assert found is not None
    assert found.fourth == pytest.approx(-6)  # odd orders cancel


def leak(alphas: Array, remainder: Array, replicates: Array) -> float:
    """A planted bug: every alpha enters the prediction, also the one that is scored."""
    window, truncation.WINDOW = truncation.WINDOW, 10.0
    try:
        found = fit(alphas, remainder, replicates)
    finally:
        truncation.WINDOW = window
    assert found is not None
    return found.value


def test_what_is_scored_never_enters_its_prediction() -> None:
    remainder = rest(np.expm1, 1.0, 1.0)
    spoilt = np.where(ALPHAS > 0.5, 100.0, remainder)

    def value(r: Array) -> float:
        found = fit(ALPHAS, r, NONE)
        assert found is not None
        return found.value

    assert value(spoilt) == value(remainder)
    assert leak(ALPHAS, spoilt, NONE) != leak(ALPHAS, remainder, NONE)


def test_noisy_points_count_less() -> None:
    g = np.random.default_rng(0)
    t = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    noise = np.array([1.0, 1e-4, 1e-4, 1e-4, 1e-4]) * t**3
    replicates = 2 * t**3 - t**4 + noise * g.standard_normal((400, 5))
    found = fit(t, 2 * t**3 - t**4 + np.array([0.5 * t[0] ** 3, 0, 0, 0, 0]), replicates)
    assert found is not None
    assert found.third == pytest.approx(2, abs=0.01)  # with equal weights the first point would move it by 0.3
    assert found.stderr[0] < 0.01


def scan(f: Callable[[Array], Array], slope: float, curvature: float, top: float = 1.5) -> float:
    """The radius by its definition, at 200 steps; NaN where it never ends."""
    t = np.linspace(0, top, 201)[1:]
    out = np.abs(rest(f, slope, curvature, t)) > 0.1 * np.maximum.accumulate(np.abs(f(t)))
    return float(t[np.argmax(out)]) if out.any() else float("nan")


CURVES: dict[str, tuple[Callable[[Array], Array], float, float]] = {
    "cubic": (lambda t: t + 0.4 * t**3, 1.0, 0.0),
    "quartic": (lambda t: -t + 0.5 * t**2 - 0.1 * t**3 + 0.2 * t**4, -1.0, 1.0),
    "exp": (lambda t: np.expm1(-2 * t), -2.0, 4.0),
    "sine": (lambda t: np.sin(2.5 * t), 2.5, 0.0),
    "through zero": (lambda t: -0.3 * t + 0.5 * t**2 + 0.1 * t**3, -0.3, 1.0),
}


@pytest.mark.parametrize("name", CURVES)
def test_radius_is_that_of_a_dense_scan(name: str) -> None:
    f, slope, curvature = CURVES[name]
    found = reach(ALPHAS, rest(f, slope, curvature), 0 * ALPHAS, slope, curvature)
    assert found.reason == "left"
    assert found.radius == pytest.approx(scan(f, slope, curvature), rel=0.02)
    assert found.beyond == bool(found.radius < 1)
    wrong = reach(ALPHAS, 6 * rest(f, slope, curvature), 0 * ALPHAS, slope, curvature)  # planted: a dropped 1/6
    assert wrong.radius != pytest.approx(scan(f, slope, curvature), rel=0.02)


def test_radius_of_a_cubic_in_closed_form() -> None:
    for cubic in (0.1, 0.5, 3.0):  # cubic t^2 = 1/9
        found = reach(ALPHAS, cubic * ALPHAS**3, 0 * ALPHAS, 1.0, 0.0)
        assert found.radius == pytest.approx((1 / 9 / cubic) ** 0.5, rel=1e-3)


def test_a_change_that_passes_zero_does_not_end_the_radius_there() -> None:
    # the change is zero at t = 0.5, where any remainder is infinitely large beside it
    found = reach(ALPHAS, 0.02 * ALPHAS**3, 0 * ALPHAS, -0.5, 2.0)
    assert (found.radius, found.reason, found.beyond) == (1.5, "held", False)


def test_it_never_reaches_beyond_the_largest_alpha_tried() -> None:
    found = reach(ALPHAS, 1e-6 * ALPHAS**3, 0 * ALPHAS, 1.0, 0.0)
    assert (found.radius, found.reason, found.judged, found.beyond) == (1.5, "held", 1.5, False)
    small = np.array([0.25, 0.5])
    assert reach(small, 0.1 * small**3, 0 * small, 1.0, 0.0).beyond is None  # alpha 1 was not tried
    assert reach(small, 3 * small**3, 0 * small, 1.0, 0.0).beyond is True  # it was left on the way
    assert reach(-small, small, 0 * small, 1.0, 0.0) == pytest.approx((np.nan, "none", 0.0, None), nan_ok=True)


def test_a_cell_that_is_back_at_one_is_still_beyond_its_radius() -> None:
    """Off by a third of the change at alpha 0.5, exact at alpha 1: the radius ends below 1, and the flag says so."""
    remainder = np.array([0.02, 0.25, 0.1, 0.0, -0.5])
    found = reach(ALPHAS, remainder, 0 * ALPHAS, 1.0, 0.0)
    assert (found.reason, found.beyond) == ("left", True)
    assert 0.25 < found.radius < 0.5
    late = reach(ALPHAS, np.array([0.0, 0.0, 0.0, 0.0, 0.9]), 0 * ALPHAS, 1.0, 0.0)
    assert (late.reason, late.beyond) == ("left", False)
    assert late.radius > 1


def test_noise_before_the_radius_is_kept_in_what_was_judged() -> None:
    """r = 0.4 t^3 leaves at 0.527; with an error of 0.1 that is seen at 0.744 only, and what hides it is said."""
    found = reach(ALPHAS, 0.4 * ALPHAS**3, 0.1 + 0 * ALPHAS, 1.0, 0.0)
    assert (found.reason, found.beyond) == ("left", True)
    assert found.radius == pytest.approx((1.645 * 0.1 / 0.4) ** (1 / 3), abs=0.01)
    assert found.judged < 0.527 < found.radius
    clear = reach(ALPHAS, 0.4 * ALPHAS**3, 1e-6 + 0 * ALPHAS, 1.0, 0.0)
    assert clear.judged >= clear.radius
    # seen to fail at 1.5 only, hidden from before 1 on: whether 1 is beyond cannot be said
    unknown = reach(ALPHAS, 0.2 * ALPHAS**3, np.array([0.0, 0.0, 0.2, 0.2, 0.2]), 1.0, 0.0)
    assert (unknown.reason, unknown.beyond) == ("left", None)
    assert unknown.judged < 1 < unknown.radius


def test_noise_and_few_effective_samples_are_reasons() -> None:
    hidden = reach(ALPHAS, 0.2 * ALPHAS**3, 0.2 * ALPHAS**3, 1.0, 0.0)
    assert np.isnan(hidden.radius)
    assert (hidden.reason, hidden.beyond) == ("noise", None)
    assert hidden.judged == pytest.approx((0.1 / (1.645 * 0.2)) ** 0.5, rel=0.1)  # noise passes a tenth of the change
    seen = reach(ALPHAS, 0.5 * ALPHAS**3, 0.2 * ALPHAS**3, 1.0, 0.0)
    assert (seen.reason, seen.beyond) == ("left", True)
    usable = np.array([True, True, False, True, True])
    starved = reach(ALPHAS, 0.1 * ALPHAS**3, 0 * ALPHAS, 1.0, 0.0, usable)
    assert np.isnan(starved.radius)
    assert (starved.reason, starved.judged, starved.beyond) == ("ess", 0.5, None)
    assert reach(ALPHAS, ALPHAS, 0 * ALPHAS, 1.0, 0.0, 0 * usable > 1).reason == "ess"
    one_prompt = reach(ALPHAS, ALPHAS**3, np.nan * ALPHAS, 1.0, 0.0)
    assert (one_prompt.reason, one_prompt.judged) == ("noise", 0.0)


def flags(correlated: bool, judge: Callable[[Array, Array], bool | None]) -> float:
    """How often a truly quadratic objective is flagged when r(t) is sampling noise that dwarfs the tolerance."""
    g = np.random.default_rng(1)
    stderr, hits, trials = 0.5 * ALPHAS**3, 0, 250
    for _ in range(trials):
        noise = stderr * (g.standard_normal() if correlated else g.standard_normal(len(ALPHAS)))
        hits += judge(noise, stderr) is True
    return hits / trials


@pytest.mark.parametrize("correlated", [True, False])
def test_noise_alone_is_flagged_at_its_nominal_rate(correlated: bool) -> None:
    """10 % where the noise of all alphas is common, as of the same sequences; at most 1 - 0.9^4 were it independent."""
    rate, nominal = flags(correlated, lambda r, s: reach(ALPHAS, r, s, 1.0, 0.0).beyond), 0.1 if correlated else 0.344
    assert rate <= nominal + 3 * (nominal * (1 - nominal) / 250) ** 0.5
    assert flags(correlated, lambda r, _: reach(ALPHAS, r, 0 * r, 1.0, 0.0).beyond) > 0.5  # planted: noise is ignored


def family(g: np.random.Generator) -> tuple[Array, float]:
    """r at ALPHAS and r(1) of a random mixture of exponentials and sines, which have every order."""
    rates, sizes = g.normal(0, 0.9, 6), g.normal(0, 1, 6)

    def f(t: Array) -> Array:
        return np.expm1(np.outer(t, rates[:3])) @ sizes[:3] + np.sin(2 * np.outer(t, rates[3:])) @ sizes[3:]

    slope = float(sizes[:3] @ rates[:3] + 2 * sizes[3:] @ rates[3:])
    curvature = float(sizes[:3] @ rates[:3] ** 2)
    r = rest(f, slope, curvature)
    return r, float(r[ALPHAS == 1][0])


def test_coverage_with_truncation_is_at_least_the_stated_rate() -> None:
    """No sampling noise, so without truncation nothing is covered; the widths must not be absurd either."""
    g, total, third, width, n = np.random.default_rng(2), 0, 0, [], 300
    for _ in range(n):
        r, actual = family(g)
        found = fit(ALPHAS, r, NONE)
        assert found is not None
        low, high = widened(np.full(2, actual), np.full(2, -found.value), found.misfit)  # measured - predicted
        total += low <= 0 <= high
        third += abs(actual - found.value) <= found.misfit
        width.append((high - low) / abs(actual))
    assert total / n >= statistics.LEVEL
    assert third / n >= statistics.LEVEL - 0.05
    assert np.median(width) < 3


def test_the_interval_keeps_sampling_noise_and_its_pairing() -> None:
    g = np.random.default_rng(3)
    second, draws = g.standard_normal(4000), 2.0 + 0 * g.standard_normal(4000)
    low, high = widened(second, draws, 0.5)
    assert low == pytest.approx(-1.645, abs=0.08)
    assert high == pytest.approx(1.645 + 2.5, abs=0.08)
    same = widened(second, -second, 0.0, second=False)  # sum of paired replicates, not of widths
    assert same == pytest.approx((0.0, 0.0))
