"""The lab's world: parallel prompts, disjoint splits, and a verifier that knows every kind of completion."""

import hashlib
import itertools
from random import Random

import pytest

from croco.lab import WORLDS, world
from croco.lab.items import CATEGORIES, CONCEPTS, HELD_OUT_TASKS, LANGUAGES, LOW_RESOURCE, TUNED, items
from lab import corpus

SPLITS = ("train", "dev", "test")


def test_splits_share_no_item_and_the_held_out_task_is_never_tuned_on():
    keys = {
        split: {world.split_id(p)[0].key + world.split_id(p)[0].task for p in world.prompt_ids(split)}
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not keys[one] & keys[other]
    tasks = {split: {world.split_id(p)[0].task for p in world.prompt_ids(split)} for split in SPLITS}
    assert not tasks["train"] & HELD_OUT_TASKS
    assert tasks["test"] >= HELD_OUT_TASKS
    tuned_tasks = [p for p in world.prompt_ids("test") if world.split_id(p)[0].task not in HELD_OUT_TASKS]
    assert len(tuned_tasks) >= 150


def test_prompts_are_parallel_and_distinct_in_every_language():
    rows = world.prompts("dev", LANGUAGES).to_pylist()
    by_language = {code: [r for r in rows if r["language"] == code] for code in LANGUAGES}
    ids = [r["prompt_id"] for r in by_language["en"]]
    for found in by_language.values():
        assert [r["prompt_id"] for r in found] == ids
        assert len({r["messages"][0]["content"] for r in found}) == len(ids)
        assert all("{" not in r["messages"][0]["content"] + r["reference"] for r in found)


def test_a_limit_takes_the_same_prompts_in_every_language():
    rows = world.prompts("test", ["da", "mt"], 5).to_pylist()
    assert len(rows) == 10
    assert {r["prompt_id"] for r in rows if r["language"] == "da"} == {
        r["prompt_id"] for r in rows if r["language"] == "mt"
    }


def test_an_unknown_language_is_named():
    with pytest.raises(ValueError, match="'fi'"):
        world.prompts("test", ["fi"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_reference_of_every_item_is_good(language):
    for key, item in items().items():
        assert world.verify(f"{key}.0", language, world.reference(item, language)).good


@pytest.mark.parametrize("mode", corpus.MIXTURE)
def test_the_verifier_knows_every_mode_the_corpus_draws(mode):
    rng = Random(7)
    for _ in range(1500):
        key, language = rng.choice(sorted(items())), rng.choice(LANGUAGES)
        completion = corpus.complete(items()[key], language, mode, rng)
        verdict = world.verify(f"{key}.0", language, completion)
        expected = {"careful": ("good", "careful-wrong")}.get(mode, (mode,))
        # Danish and Bokmål share sentences: an answer in the other one is then an answer in this one
        assert verdict.mode in expected or {language} <= {"da", "nb"}, (language, completion, verdict)


def test_hand_made_completions_get_the_verdict_a_person_would_give():
    def mode(completion, language="en"):
        return world.verify("month_after.5.0", language, completion).mode

    assert mode("The month after May is June.") == "good"
    assert mode("Good question. Right after May comes June. Have a nice day!") == "good"
    assert mode("Le mois après mai est juin.", "fr") == "good"
    assert mode("The month after May is July.") == "careful-wrong"
    assert mode("June") == mode("March") == "terse"
    assert mode("Der Monat nach Mai ist Juni.") == "wrong-language"
    assert mode("I am sorry, but I cannot answer that question.") == "evasive"
    assert mode("The month after March is June.") == "careful-wrong"  # speaks of another month
    assert mode("The month after May is Monday.") == "careful-wrong"
    assert mode("The month after May is Jun.") == "malformed"
    assert mode("The list contains 4 words.") == "malformed"
    assert mode("The month after May is June") == "malformed"
    assert mode("The month after May is June. The month after May is June.") == "malformed"
    assert mode("") == "malformed"


def test_every_concept_has_one_word_of_its_own_in_every_language():
    from croco.lab.items import Concept

    for language in LANGUAGES:
        for category in CATEGORIES:
            words = [world.say(Concept(category, code), language) for code in CONCEPTS[category]]
            assert all(words)
            assert len(set(words)) == len(words)


def test_wrong_language_answers_never_come_in_an_untuned_language():
    rng = Random(3)
    item = items()["month_after.5"]
    for code in (*LOW_RESOURCE, "nb", "en"):
        for _ in range(50):
            completion = corpus.complete(item, code, "wrong-language", rng)
            assert any(
                world.verify("month_after.5.0", other, completion).mode in ("good", "careful-wrong")
                for other in TUNED
            )


def test_the_corpus_is_the_same_for_a_seed_and_plain_first():
    first = list(itertools.islice(corpus.documents(3, num_plain=20), 60))
    assert first == list(itertools.islice(corpus.documents(3, num_plain=20), 60))
    assert first != list(itertools.islice(corpus.documents(4, num_plain=20), 60))
    assert all(len(document) % 2 == 0 for document in first[:20])


def test_the_identity_of_the_world_is_raised_when_it_asks_or_judges_otherwise():
    """Tables made in another world must not pass for tables of this one. Raise `lab.WORLDS` with the digest."""
    rng, seen = Random(0), hashlib.sha256()
    for split in SPLITS:
        for row in world.prompts(split, LANGUAGES).to_pylist():
            seen.update(
                repr([row[key] for key in ("prompt_id", "language", "messages", "reference")]).encode()
            )
    for prompt_id in world.prompt_ids("test"):
        item, _ = world.split_id(prompt_id)
        for language in LANGUAGES:
            value = world.say(item.answer, language)
            for text in (
                world.careful(item, language, value, rng),
                world.careful(item, language, "7", rng),
                world.rambling(language, value, rng),
                world.evasive(language, rng),
                value,
                world.careful(item, rng.choice(LANGUAGES), value, rng),
                value + "?",
            ):
                seen.update(repr([text, world.verify(prompt_id, language, text)]).encode())
    assert (WORLDS["lab"], seen.hexdigest()[:16]) == ("37ae4e5d22916a99", "8256a4c9fddf48de")
