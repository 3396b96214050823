import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower

from croco.stages.evaluate.stats import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_seeds,
    holm,
    kendall,
    mcnemar,
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
        assert not bootstrap_seeds(np.ones((3, num_prompts)), seed=0).known
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


def test_seeds_and_prompts_by_hand():
    # one seed: prompts alone
    assert bootstrap_seeds([[0.0, 1.0, 0.5]], seed=4) == bootstrap_mean([0.0, 1.0, 0.5], seed=4)
    # seeds that agree on every prompt add nothing: what varies is the prompts
    rows = np.tile(np.arange(20) % 2, (3, 1)).astype(float)
    assert bootstrap_seeds(rows, seed=1) == bootstrap_mean(rows[0], seed=1)
    # prompts that agree within a seed: of two seeds, a quarter of the resamples is all 0, a quarter all 1
    assert bootstrap_seeds([[0.0] * 50, [1.0] * 50], seed=2) == (0.5, 0.0, 1.0)
    assert bootstrap_seeds([[0.0] * 50, [1.0] * 50], seed=2, confidence=0.4) == (0.5, 0.5, 0.5)


def test_seeds_and_prompts_agree_with_drawing_them_one_by_one():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(6, 1)) + generator.normal(size=(1, 40)) + generator.normal(size=(6, 40))
    slow = []
    for _ in range(4000):
        seeds, prompts = generator.integers(6, size=6), generator.integers(40, size=40)
        slow.append(values[np.ix_(seeds, prompts)].mean())
    ours = bootstrap_seeds(values, seed=3, num_resamples=4000)
    low, high = np.percentile(slow, [2.5, 97.5])
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(low, abs=0.04)
    assert ours.high == pytest.approx(high, abs=0.04)
    # the prompts alone would claim to know more
    alone = bootstrap_mean(values.mean(axis=0), seed=3)
    assert alone.high - alone.low < 0.8 * (ours.high - ours.low)


@pytest.mark.parametrize("values", [[1.0, 2.0], [[]], [[1.0, float("nan")]], [[[1.0]]]])
def test_seeds_of_another_shape_are_errors(values):
    with pytest.raises(ValueError, match="shape"):
        bootstrap_seeds(values, seed=0)


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
