import math

import numpy as np
import pytest

from lab.results import (
    STEP_TIME,
    T_QUANTILES,
    Difference,
    difference,
    difference_text,
    spread,
    spread_text,
    step_time,
)


def test_student_quantiles_are_those_of_the_density():
    def upper_tail(quantile, degrees):  # 1 - CDF by the trapezoid rule on x = tan(u)
        u = np.linspace(math.atan(quantile), math.pi / 2 - 1e-9, 200_001)
        x = np.tan(u)
        scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
        density = math.exp(scale) / math.sqrt(degrees * math.pi)
        values = density * (1 + x**2 / degrees) ** (-(degrees + 1) / 2) * (1 + x**2)
        return np.sum((values[1:] + values[:-1]) / 2 * np.diff(u))

    assert len(T_QUANTILES) == 30
    for degrees, quantile in enumerate(T_QUANTILES, start=1):
        assert upper_tail(quantile, degrees) == pytest.approx(0.025, abs=4e-5), degrees


def test_mean_and_spread_equal_a_hand_calculation():
    assert spread([]) is None
    assert spread([0.5]).mean == 0.5
    assert math.isnan(spread([0.5]).deviation)
    assert spread([1.0, 2.0, 4.5]) == pytest.approx((2.5, math.sqrt((1.5**2 + 0.5**2 + 2**2) / 2)))


def test_the_paired_difference_equals_a_hand_calculation():
    first, own = {0: 0.50, 1: 0.60, 2: 0.70}, {2: 0.73, 0: 0.51, 1: 0.62, 7: 0.99}
    # Differences .03, .01, .02: mean .02, deviation .01, t(2) = 4.303: .02 +- 4.303 * .01 / sqrt 3
    found = difference(own, first)
    margin = 4.303 * 0.01 / math.sqrt(3)
    assert found == pytest.approx((0.02, 0.02 - margin, 0.02 + margin, 3))
    assert found.verdict == "no"


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (Difference(0.2, 0.1, 0.3, 3), "yes"),
        (Difference(-0.2, -0.3, -0.1, 3), "yes"),
        (Difference(0.0, 0.0, 0.0, 3), "no"),
        (Difference(0.1, -0.1, 0.3, 3), "no"),
        (Difference(0.1, math.nan, math.nan, 1), "unknown"),
    ],
)
def test_a_difference_exceeds_the_noise_only_if_zero_lies_outside(found, verdict):
    assert found.verdict == verdict


def test_one_common_seed_says_nothing_and_none_is_no_difference():
    assert difference({0: 0.7}, {0: 0.5, 1: 0.6}).verdict == "unknown"
    assert difference({0: 0.7}, {1: 0.6}) is None
    assert difference({}, {}) is None
    assert difference_text(None, "AP50") == "-"


def test_beyond_thirty_pairs_the_interval_is_that_of_thirty():
    own = {seed: float(seed % 2) for seed in range(100)}
    found = difference(own, dict.fromkeys(own, 0.0))
    deviation = math.sqrt(100 * 0.25 / 99)
    assert found.high - found.mean == pytest.approx(2.042 * deviation / 10)


def test_texts_have_the_digits_that_are_worth_it():
    assert spread_text(spread([0.5, 0.6]), "AP50") == "0.550 ± 0.071"
    assert spread_text(spread([0.5]), "AP50") == "0.500"
    assert spread_text(None, "AP50") == "-"
    assert spread_text(spread([582.84]), STEP_TIME) == "582.8"
    found = difference_text(Difference(-0.2, -0.3, -0.1, 3), "AP")
    assert found == "-0.200\n[-0.300, -0.100]\n3 pairs"
    assert difference_text(Difference(0.1, math.nan, math.nan, 1), "AP") == "+0.100\n1 pair"


def test_a_small_difference_is_never_written_as_zero():
    found = difference_text(Difference(0.0123, 0.00004, 0.02456, 3), "AP50")
    assert found == "+0.01230\n[+0.00004, +0.02456]\n3 pairs"
    assert difference_text(Difference(-0.0003, math.nan, math.nan, 1), "AP") == "-0.0003\n1 pair"
    assert (
        difference_text(Difference(0.0, 0.0, 0.0, 2), "AP") == "+0.000\n[+0.000, +0.000]\n2 pairs"
    )
    assert spread_text(spread([0.5, 0.5004]), "AP50") == "0.5002 ± 0.0003"
    assert spread_text(spread([0.5, 0.5]), "AP50") == "0.500 ± 0.000"
    assert difference_text(Difference(1e-12, math.nan, math.nan, 1), "AP") == "+0.000000\n1 pair"


def test_the_step_time_is_the_median_over_epochs():
    rows = [(4, 2), (8, 6), (12, 2.8)]  # 500, 1500 and 700 ms a step
    assert step_time([{"step": str(s), "seconds": str(t)} for s, t in rows]) == pytest.approx(700)
    assert math.isnan(step_time([]))
