import numpy as np
import pytest

from croco.evaluation.stats import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    resample_counts,
    verdict,
)


def test_every_resample_draws_as_many_prompts_as_there_are():
    counts = resample_counts(7, seed=3, num_resamples=50)
    assert counts.shape == (50, 7)
    assert (counts.sum(axis=1) == 7).all()
    assert np.array_equal(counts, resample_counts(7, seed=3, num_resamples=50))
    assert not np.array_equal(counts, resample_counts(7, seed=4, num_resamples=50))


def test_the_mean_is_the_mean_and_a_constant_has_no_width():
    assert bootstrap_mean([1.0, 2.0, 6.0], seed=0).value == 3.0
    assert bootstrap_mean([0.5] * 9, seed=0) == (0.5, 0.5, 0.5)
    assert bootstrap_mean([4.0], seed=0) == (4.0, 4.0, 4.0)


def test_two_prompts_by_hand():
    # Resamples of {0, 1} have means 0, 1/2, 1/2, 1: a quarter of them at either end, so 95 % reaches both.
    assert bootstrap_mean([0.0, 1.0], seed=1) == (0.5, 0.0, 1.0)
    # At 40 % the tails cut off 30 % on each side, more than the quarter at the ends.
    assert bootstrap_mean([0.0, 1.0], seed=1, confidence=0.4) == (0.5, 0.5, 0.5)


def test_weights_by_hand():
    sums, weights = np.array([[2.0], [0.0]]), np.array([[4.0], [1.0]])
    counts = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    (interval,) = bootstrap_ratio(sums, weights, counts, confidence=0.999999)
    assert interval.value == pytest.approx(0.4)
    assert interval.low == pytest.approx(0.0, abs=1e-5)
    assert interval.high == pytest.approx(0.5, abs=1e-5)


def test_a_prompt_without_values_takes_no_part():
    counts = resample_counts(3, seed=0, num_resamples=200)
    (interval,) = bootstrap_ratio(np.array([[1.0], [1.0], [0.0]]), np.array([[1.0], [1.0], [0.0]]), counts)
    assert interval == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="without any value"):
        bootstrap_ratio(np.zeros((3, 1)), np.zeros((3, 1)), counts)


def test_agrees_with_the_analytic_interval():
    share, num_prompts = 0.3, 400
    values = (np.arange(num_prompts) < share * num_prompts).astype(float)
    interval = bootstrap_mean(values, seed=5, num_resamples=4000)
    half = 1.96 * np.sqrt(share * (1 - share) / num_prompts)
    assert interval.low == pytest.approx(share - half, abs=0.005)
    assert interval.high == pytest.approx(share + half, abs=0.005)


def test_agrees_with_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(2).gamma(2.0, size=120)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=9999, method="percentile", rng=1
    ).confidence_interval
    ours = bootstrap_mean(values, seed=1, num_resamples=9999)
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_bad_values_are_errors():
    for values in ([], [1.0, float("nan")], [[1.0], [2.0]]):
        with pytest.raises(ValueError):
            bootstrap_mean(values, seed=0)


def test_verdicts():
    assert verdict(Interval(0.1, 0.05, 0.2)) == "better"
    assert verdict(Interval(-0.1, -0.2, -0.05)) == "worse"
    assert verdict(Interval(0.1, 0.0, 0.2)) == "not resolved"
