import numpy as np
import polars as pl
import pytest
from scipy import stats as scipy_stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.weightstats import ttost_paired

from croco.stages.evaluate.stats import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    holm,
    kendall,
    mcnemar,
    over_seeds_and_prompts,
    prompts_to_resolve,
    resample_counts,
    sign_flip,
    spearman,
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


def test_fewer_than_six_prompts_have_a_mean_and_no_interval():
    for num_prompts in (1, 2, 5):
        found = bootstrap_mean([1.0] * num_prompts, seed=0)
        assert (found.value, found.known, verdict(found)) == (1.0, False, "not resolved")
        assert not over_seeds_and_prompts(np.ones((3, num_prompts))).interval().known
        assert sign_flip([1.0] * num_prompts, seed=0) > 0.05  # what the limit comes from
    assert verdict(bootstrap_mean([1.0] * 6, seed=0)) == "better"
    assert sign_flip([1.0] * 6, seed=0) < 0.05


def test_the_limit_is_of_the_prompts_that_have_a_value():
    weights = np.stack([np.ones(8), np.arange(8) < 3], axis=1).astype(float)
    every, few = bootstrap_ratio(weights, weights, resample_counts(8, seed=0))
    assert (every.known, few.known) == (True, False)


def test_two_prompts_by_hand():
    # Resamples of {0, 1} have means 0, 1/2, 1/2, 1: a quarter of them at either end, so 95 % reaches both.
    assert bootstrap_mean([0.0, 1.0], seed=1, min_prompts=1) == (0.5, 0.0, 1.0)
    # At 40 % the tails cut off 30 % on each side, more than the quarter at the ends.
    assert bootstrap_mean([0.0, 1.0], seed=1, confidence=0.4, min_prompts=1) == (0.5, 0.5, 0.5)


def test_weights_by_hand():
    sums, weights = np.array([[2.0], [0.0]]), np.array([[4.0], [1.0]])
    counts = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    (interval,) = bootstrap_ratio(sums, weights, counts, confidence=0.999999, min_prompts=1)
    assert interval.value == pytest.approx(0.4)
    assert interval.low == pytest.approx(0.0, abs=1e-5)
    assert interval.high == pytest.approx(0.5, abs=1e-5)


def test_a_prompt_without_values_takes_no_part():
    counts = resample_counts(3, seed=0, num_resamples=200)
    there = np.array([[1.0], [1.0], [0.0]])
    (interval,) = bootstrap_ratio(there, there, counts, min_prompts=2)
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


def test_one_seed_is_students_t_over_prompts():
    values = np.random.default_rng(0).normal(0.02, 0.1, size=40)
    found = over_seeds_and_prompts(values[None])
    theirs = scipy_stats.ttest_1samp(values, 0.0)
    assert found.interval()[1:] == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert found.p_above(0.0) == pytest.approx(
        scipy_stats.ttest_1samp(values, 0.0, alternative="greater").pvalue
    )
    # both one-sided tests of an equivalence
    low, high = -0.05, 0.05
    p_value = max(found.p_above(low), 1 - found.p_above(high))
    assert p_value == pytest.approx(ttost_paired(values, np.zeros(40), low, high)[0])


def crossed(generator, shape, of_seeds, of_prompts, of_cells):
    """Values with mean zero: effects of seeds, of prompts, and of each seed on each prompt."""
    seeds = generator.normal(0, of_seeds, size=(*shape[:-1], 1))
    prompts = generator.normal(0, of_prompts, size=(*shape[:-2], 1, shape[-1]))
    return seeds + prompts + generator.normal(0, of_cells, size=shape)


def test_seeds_and_prompts_are_mean_squares_as_statsmodels_has_them():
    values = crossed(np.random.default_rng(1), (5, 30), 0.3, 0.5, 1.0)
    seeds, prompts = np.indices(values.shape)
    rows = pl.DataFrame({"seed": seeds.ravel(), "prompt": prompts.ravel(), "value": values.ravel()})
    table = anova_lm(ols("value ~ C(seed) + C(prompt)", rows.to_pandas()).fit())
    of_seeds, of_prompts, of_cells = table["mean_sq"]
    found = over_seeds_and_prompts(values)
    assert of_seeds > of_cells < of_prompts
    assert found.error**2 == pytest.approx((of_seeds + of_prompts - of_cells) / 150)
    assert found.value == pytest.approx(values.mean())
    # Satterthwaite's degrees of freedom, by hand
    parts = [(of_seeds, 4), (of_prompts, 29), (of_cells, 4 * 29)]
    expected = (of_seeds + of_prompts - of_cells) ** 2 / sum(square**2 / df for square, df in parts)
    assert found.df == pytest.approx(expected)


@pytest.mark.parametrize(("num_seeds", "num_prompts"), [(2, 60), (3, 63), (8, 150)])
@pytest.mark.parametrize("of_seeds", [0.0, 0.01, 0.05])
def test_intervals_cover_what_they_say(num_seeds, num_prompts, of_seeds):
    """Truth 0, with the spreads that an audit of the lab's study measured, and a larger one between seeds."""
    generator, times = np.random.default_rng(2), 1000
    worlds = crossed(generator, (times, num_seeds, num_prompts), of_seeds, 0.2, 0.3)
    covered = sum(low <= 0 <= high for _, low, high in (over_seeds_and_prompts(w).interval() for w in worlds))
    assert 0.92 <= covered / times <= 0.98


def test_two_sets_of_prompts_share_their_seeds():
    generator, times = np.random.default_rng(3), 600
    covered, alone = 0, 0
    for _ in range(times):
        seeds = generator.normal(0, 0.1, size=(6, 1))
        one, other = (crossed(generator, (6, n), 0.0, 0.2, 0.2) for n in (50, 80))
        found = over_seeds_and_prompts(one + seeds, -(other + seeds))  # the seeds' part cancels
        covered += found.interval().low <= 0 <= found.interval().high
        alone += found.error < over_seeds_and_prompts(one + seeds).error
    assert 0.925 <= covered / times <= 0.985
    assert alone > 0.75 * times


def test_a_difference_without_spread_is_certain():
    up, same = over_seeds_and_prompts(np.full((3, 8), 0.1)), over_seeds_and_prompts(np.zeros((3, 8)))
    assert up.interval() == (pytest.approx(0.1),) * 3
    assert [up.p_above(0.0), up.p_above(0.2), same.p_above(0.0)] == pytest.approx([0.0, 1.0, 0.5])


@pytest.mark.parametrize("values", [[1.0, 2.0], [[]], [[1.0, float("nan")]], [[[1.0]]]])
def test_seeds_of_another_shape_are_errors(values):
    with pytest.raises(ValueError, match="shape"):
        over_seeds_and_prompts(values)


def test_mcnemar_by_hand():
    # three prompts differ, all for us: 2 · (1/2)³
    assert mcnemar([1, 1, 1, 0, 1], [0, 0, 0, 0, 1]) == 0.25
    assert mcnemar([1, 0], [0, 1]) == 1.0
    assert mcnemar([1, 0], [1, 0]) == 1.0
    with pytest.raises(ValueError, match="same prompts"):
        mcnemar([1, 0], [1])
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar([0.5, 0], [1, 0])


@pytest.mark.parametrize(("wins", "losses"), [(1, 0), (7, 2), (30, 51), (400, 333), (1500, 1400)])
def test_mcnemar_agrees_with_statsmodels(wins, losses):
    ours = [1] * wins + [0] * losses + [1, 0]
    theirs = [0] * wins + [1] * losses + [1, 0]
    expected = their_mcnemar([[1, wins], [losses, 1]], exact=True).pvalue
    assert mcnemar(ours, theirs) == pytest.approx(expected, rel=1e-9)


def test_sign_flips_by_hand():
    # of the 8 patterns of three equal differences two are as far out
    assert sign_flip([1.0, 1.0, 1.0], seed=0) == 0.25
    # sums ±1 ±2 are -3 -1 1 3; what was seen, -1, is reached by all four
    assert sign_flip([1.0, -2.0], seed=0) == 1.0
    assert sign_flip([0.0, 0.0], seed=0) == 1.0
    assert sign_flip([3.0, 0.0], seed=0) == 1.0


def test_sign_flips_agree_with_scipy():
    few = np.random.default_rng(1).normal(0.6, 1.0, size=12)
    theirs = scipy_stats.permutation_test(
        (few, np.zeros(12)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip(few, seed=0) == pytest.approx(theirs.pvalue, abs=1e-12)
    many = np.random.default_rng(2).normal(0.1, 1.0, size=300)
    assert sign_flip(many, seed=0) == pytest.approx(scipy_stats.ttest_1samp(many, 0).pvalue, abs=0.02)
    # the smallest there can be is one in all that were drawn
    assert sign_flip(np.ones(400), seed=0) == 1 / 10_001


def test_holm_by_hand():
    # 3 · 0.01, 2 · 0.02, then 0.03 raised to the one before it
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_agrees_with_statsmodels():
    p_values = np.random.default_rng(3).uniform(size=56) ** 3
    assert holm(list(p_values)) == pytest.approx(list(multipletests(p_values, method="holm")[1]))


def test_how_many_prompts_would_resolve_it():
    # mean 1/2, std √(1/2 · 2/3 …): differences 0, 1, 0, 1 have std √(1/3); (2.8016 · √(1/3) / 0.5)² = 10.47
    assert prompts_to_resolve([0.0, 1.0, 0.0, 1.0]) == 11
    assert prompts_to_resolve([1.0, -1.0]) is None
    assert prompts_to_resolve([1.0]) is None
    assert prompts_to_resolve([1.0, 1.0]) == 2
    differences = np.random.default_rng(4).normal(0.05, 0.6, size=200)
    effect = abs(differences.mean()) / differences.std(ddof=1)
    theirs = NormalIndPower().solve_power(effect_size=effect, alpha=0.05, power=0.8, ratio=0)
    assert prompts_to_resolve(differences) == pytest.approx(theirs, abs=1)


def test_as_many_prompts_as_it_says_resolve_it_as_often_as_it_says():
    generator = np.random.default_rng(5)
    needed = prompts_to_resolve(generator.normal(0.3, 1.0, size=100_000))
    found = [scipy_stats.ttest_1samp(generator.normal(0.3, 1.0, size=needed), 0).pvalue for _ in range(2000)]
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.8, abs=0.03)


def test_rank_correlations_by_hand():
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx((5 - 1) / 6)
    assert kendall([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert np.isnan(kendall([1, 1, 1], [1, 2, 3]))
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize("levels", [2, 5, 40, 10**9])
@pytest.mark.parametrize("size", [2, 3, 17, 400])
def test_rank_correlations_agree_with_scipy(size, levels):
    generator = np.random.default_rng(size + levels)
    a = generator.integers(levels, size=size)
    b = a // 2 + generator.integers(levels, size=size)
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert kendall(a, b) == pytest.approx(scipy_stats.kendalltau(a, b).statistic)
        assert spearman(a, b) == pytest.approx(scipy_stats.spearmanr(a, b).statistic)
    else:
        assert np.isnan(kendall(a, b))
