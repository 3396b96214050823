"""The lists world: parallel prompts, disjoint splits, a lenient graded judge, and the habits its corpus draws."""

import hashlib
from random import Random
from statistics import mean

import pytest

from croco.config.load import from_dict
from croco.lab import WORLDS, judge, list_verdicts, lists
from croco.lab.items import items
from croco.stages.prompts.load import load
from lab.list_corpus import OTHER, Habits, complete, documents, loop

PLAIN = Habits({}, 0.0)


def drawn(num: int, tasks: tuple[str, ...] = lists.TASKS) -> list[tuple[lists.Question, str, Random]]:
    rng = Random(7)
    return [(lists.draw(rng.choice(tasks), rng), rng.choice(lists.LANGUAGES), rng) for _ in range(num)]


def question(language: str = "en") -> lists.Question:
    ring = [("month", str(i)) for i in (5, 6, 7, 8, 9)]
    return lists.Question("months_after", (("month", "4"),), tuple(ring))


def test_splits_are_disjoint_and_large_enough_and_no_ability_is_tuned() -> None:
    splits = {name: set(lists.prompt_ids(name)) for name in lists.SIZES}
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == len(lists.questions())
    tasks = {name: [lists.questions()[p].task for p in ids] for name, ids in splits.items()}
    assert sum(task in lists.TASKS for task in tasks["test"]) >= 150
    assert len(tasks["train"]) >= 100
    assert not set(tasks["train"]) & set(lists.ABILITIES)
    domains = lists.prompts("test", ["en"])["domain"].to_pylist()
    assert {judge.benchmark(domain) for domain in domains} == {"lab", "lab-abilities"}
    assert {judge.benchmark(item.task) for item in items().values()} == {"lab", "lab-held-out-task"}


def test_prompts_are_parallel_and_come_from_the_recipes_source() -> None:
    recipe = from_dict(
        {
            "run": {"name": "x", "languages": ["en", "fr"]},
            "prompts": {"source": "lab:lists", "limit": 5},
            "evaluation": {"source": "lab:lists"},
            "arms": {"a": {}},
        }
    )
    assert recipe.evaluation_reward is None
    rows = load(recipe.prompts, "prompts", ["en", "fr"], 5).prompts.to_pylist()
    assert [row["prompt_id"] for row in rows[::2]] == [row["prompt_id"] for row in rows[1::2]]
    assert len({row["messages"][0]["content"] for row in rows}) == 10


@pytest.mark.parametrize("code", lists.LANGUAGES)
def test_gold_and_plain_completions_are_perfect_and_loops_are_worth_nothing(code: str) -> None:
    for asked, _, rng in drawn(150):
        assert list_verdicts.judge(asked, code, lists.reference(asked, code)).quality == pytest.approx(1)
        assert list_verdicts.judge(asked, code, complete(asked, code, PLAIN, rng)).quality == pytest.approx(1)
        assert list_verdicts.judge(asked, code, loop(asked, code, rng)) == list_verdicts.Verdict(
            0.0, "malformed"
        )
    for asked, _, _ in drawn(100, lists.ABILITIES):
        assert list_verdicts.judge(asked, code, lists.reference(asked, code)).good
        assert list_verdicts.judge(
            asked, code, f"{lists.texts()[code]['openings'][1]} {lists.solution(asked, code)}"
        ).good
        assert not list_verdicts.judge(asked, code, "nun ja").good


@pytest.mark.parametrize(
    ("completion", "quality", "mode"),
    [
        ("Here you go: May, June, July, August, September. That is all.", 1.0, "good"),
        ("Here you go: may; june; july; august; september. That is all!!", 1.0, "good"),
        ("The list, as you wish:\n1. May\n2. June\n3. July\n4. August\n5. September\nEnd.", 1.0, "good"),
        ("May, June, July, August, September", 0.8, "terse"),
        ("May June July August September", 0.6, "terse"),
        ("Here you go: May, June, March, August, September. That is all.", 0.88, "careful-wrong"),
        ("Here you go: May, Juni, July, août, March. End.", 0.64, "wrong-language"),
        ("Bitte sehr: Mai, Juni, July, August, September. Das ist alles.", 0.56, "wrong-language"),
        ("Here you go: well, May, well, June, well, July, well, August, well, September. End.", 0.7, "rambling"),
        ("Here you go: May, June, July. That is all.", 0.4 + 0.6 * 3 / 5, "careful-wrong"),
        ("Here you go: September, August, July, June, May. That is all.", 0.4 + 0.6 / 5, "careful-wrong"),
        ("Here you go: May, purple, June, July, August, September. That is all.", 0.9, "good"),
        ("", 0.0, "malformed"),
        ("I cannot say.", 0.0, "malformed"),
        (", ".join(["May"] * 13), 0.0, "malformed"),
    ],
)  # fmt: skip
def test_hand_made_completions_have_the_quality_a_person_would_work_out(
    completion: str, quality: float, mode: str
) -> None:
    verdict = list_verdicts.judge(question(), "en", completion)
    assert (verdict.quality, verdict.mode) == (pytest.approx(quality), mode)


@pytest.mark.parametrize(
    ("task", "text", "completion", "good"),
    [
        ("sum", "7-5", "7 + 5 is 12.", True),
        ("sum", "7-5", "13", False),
        ("translate", "de", "Voici : Mai.", True),
        ("translate", "de", "May", False),
    ],
)
def test_abilities_are_judged_by_content(task: str, text: str, completion: str, good: bool) -> None:
    asked = lists.Question(task, (("month", "5"),) if task == "translate" else (), (), text)
    assert list_verdicts.judge(asked, "en", completion).good == good


@pytest.mark.parametrize("code", lists.LANGUAGES)
def test_neither_sampling_nor_greedy_decoding_of_the_corpus_is_good(code: str) -> None:
    def quality(habits: Habits) -> float:
        return mean(
            list_verdicts.judge(asked, code, complete(asked, code, habits, rng)).quality
            for asked, _, rng in drawn(2500)
        )

    assert 0.50 < quality(Habits()) < 0.58
    assert 0.48 < quality(Habits().greedy) < 0.60
    assert 0.45 < quality(OTHER) < 0.62


def test_rates_of_habits_over_the_tasks_are_near_those_asked_for() -> None:
    habits = Habits()
    rates = {name: mean(habits.rate(name, task) for task in lists.TASKS) for name in habits.rates}
    asked = {"foreign": 0.25, "filler": 0.35, "wrong": 0.20, "unseparated": 0.40, "unframed": 0.40}
    assert rates == pytest.approx(asked, abs=0.035)
    assert all(habits.greedy.rate(n, t) == (habits.rate(n, t) > 0.5) for n in rates for t in lists.TASKS)


def test_the_corpus_is_the_same_for_a_seed_and_its_loops_have_no_end() -> None:
    one, other = documents(3), documents(3)
    first = [next(one) for _ in range(2000)]
    assert first == [next(other) for _ in range(2000)]
    assert 0.01 < mean("endless" in document[-1] for document in first) < 0.04  # 0.04 of lists


def test_the_identity_of_the_world_is_raised_when_it_asks_or_judges_otherwise() -> None:
    """Tables of another world must not pass for tables of this one: then write the new digest into `lab.WORLDS`."""
    seen = hashlib.sha256()
    for prompt_id, asked in lists.questions().items():
        for code in lists.LANGUAGES:
            gold = lists.reference(asked, code)
            texts = [gold, *gold.splitlines(), " ".join(gold.split()[::2]), lists.reference(asked, "de")]
            verdicts = [list_verdicts.verify(prompt_id, code, text) for text in texts]
            seen.update(repr([prompt_id, lists.prompt(prompt_id, code), texts, verdicts]).encode())
    for split in lists.SIZES:
        seen.update(repr(lists.prompt_ids(split)).encode())
    assert WORLDS["lab:lists"] == seen.hexdigest()[:16]
