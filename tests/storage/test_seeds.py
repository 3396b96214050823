"""Seeds name samples: stable across processes, different for every part of the key."""

from croco.storage.seeds import digest, sample_seed


def test_seeds_are_stable_and_fit_the_table():
    assert sample_seed(0, "p1", "da", 3) == 165087295609284205
    assert all(0 <= sample_seed(0, f"p{i}", "en", i) < 2**63 for i in range(1000))


def test_every_part_of_the_key_matters():
    keys = {
        (run, prompt, language, i)
        for run in (0, 1)
        for prompt in "ab"
        for language in ("da", "en")
        for i in range(9)
    }
    assert len({sample_seed(*key) for key in keys}) == len(keys)
    assert digest("a", "bc") != digest("ab", "c")
