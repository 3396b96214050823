"""Length-controlled win rates: by hand where symmetry gives the answer, and against a general optimiser."""

import numpy as np
import pytest
from scipy.optimize import minimize

from croco.stages.evaluate.stats import resample_counts
from croco.stages.evaluate.winrate import fit, pooled, scaled


def length_controlled(preferences, length_differences) -> float:
    return fit(preferences, length_differences, np.ones((1, len(preferences)))).value


def slow(y: np.ndarray, x: np.ndarray, counts: np.ndarray | None = None) -> float:
    """σ(θ) by a general optimiser on the penalised likelihood."""
    weights = np.ones(len(y)) if counts is None else counts

    def loss(parameters: np.ndarray) -> float:
        logit = parameters[0] + parameters[1] * x
        likelihood = y * -np.logaddexp(0, -logit) + (1 - y) * -np.logaddexp(0, logit)
        return float(-(weights * likelihood).sum() + parameters[1] ** 2)

    theta = minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9}).x[0]
    return float(1 / (1 + np.exp(-theta)))


def test_by_hand():
    # wins exactly where the completion is longer: all of it is length
    assert length_controlled([1, 0, 1, 0], [10, -10, 10, -10]) == pytest.approx(0.5)
    # no difference in length anywhere, or the same everywhere: the mean
    assert length_controlled([1, 1, 0, 0.5], [0, 0, 0, 0]) == 0.625
    assert length_controlled([1, 1, 0, 0.5], [7, 7, 7, 7]) == 0.625
    # one side wins all: no finite θ, and the mean says it
    assert length_controlled([1, 1, 1], [5, -3, 0]) == 1.0
    assert length_controlled([0, 0], [5, -3]) == 0.0
    # ties everywhere
    assert length_controlled([0.5, 0.5], [5, -3]) == pytest.approx(0.5)
    # as often better where longer as where shorter: length has no part in it
    assert length_controlled([1, 1, 0, 1, 1, 0], [4, 4, 4, -4, -4, -4]) == pytest.approx(2 / 3)


def test_one_that_wins_by_length_loses_by_it():
    generator = np.random.default_rng(0)
    delta = generator.normal(80, 120, size=400)
    y = (generator.uniform(size=400) < 1 / (1 + np.exp(-delta / 60))).astype(float)
    assert y.mean() >= 0.7
    assert 0.45 < length_controlled(y, delta) < 0.6


def test_mirrored():
    generator = np.random.default_rng(1)
    y, delta = generator.choice([0, 0.5, 1], size=60), generator.normal(10, 50, size=60)
    assert length_controlled(1 - y, -delta) == pytest.approx(1 - length_controlled(y, delta))


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_a_general_optimiser(seed):
    generator = np.random.default_rng(seed)
    size = int(generator.integers(3, 80))
    y = generator.choice([0, 0.5, 1], size=size)
    delta = generator.normal(generator.normal(0, 100), 60, size=size)
    assert length_controlled(y, delta) == pytest.approx(slow(y, scaled(delta)), abs=1e-6)


def test_separable_data_has_a_maximum_all_the_same():
    y, delta = np.array([1, 1, 1, 0, 0, 0, 0.0]), np.array([30, 20, 10, 5, -10, -20, -30.0])
    assert length_controlled(y, delta) == pytest.approx(slow(y, scaled(delta)), abs=1e-6)


def test_the_interval_agrees_with_fits_one_by_one():
    generator = np.random.default_rng(3)
    num_prompts, languages = 30, 2
    prompts = np.tile(np.arange(num_prompts), languages)
    groups = np.repeat(np.arange(languages), num_prompts)
    y = generator.choice([0.0, 0.5, 1.0], size=60)
    delta = generator.normal(20, 40, size=60) * (1 + groups)
    counts = resample_counts(num_prompts, 5, 200)
    of_language = [
        fit(y[groups == g], delta[groups == g], counts[:, prompts[groups == g]]) for g in range(languages)
    ]
    ours = pooled(of_language)
    fits = []
    for row in counts:
        each = [
            slow(y[groups == g], scaled(delta[groups == g]), row[prompts[groups == g]])
            for g in range(languages)
        ]
        fits.append(np.mean(each))
    assert ours.value == pytest.approx(
        np.mean([length_controlled(y[groups == g], delta[groups == g]) for g in range(languages)])
    )
    assert ours.low == pytest.approx(np.percentile(fits, 2.5), abs=1e-5)
    assert ours.high == pytest.approx(np.percentile(fits, 97.5), abs=1e-5)
    assert ours.low < ours.value < ours.high


def test_bad_values_are_errors():
    for y, delta in (([], []), ([1, 0], [1]), ([[1.0]], [[1.0]])):
        with pytest.raises(ValueError):
            length_controlled(y, delta)


def test_languages_count_by_their_comparisons():
    counts = resample_counts(4, 0, 10)
    many, one = fit([1.0, 1.0, 1.0], [0, 0, 0], counts[:, :3]), fit([0.0], [5], counts[:, 3:])
    assert pooled([many, one]).value == 0.75
    # a resample that draws none of a language is of the others alone
    assert pooled([one]) == (0.0, 0.0, 0.0)
