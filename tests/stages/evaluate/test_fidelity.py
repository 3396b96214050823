import pytest

from croco.stages.evaluate.fidelity import (
    RIGHT,
    UNKNOWN,
    WRONG,
    found_language,
    found_languages,
    language_mode,
)

AMONG = ["da", "nl", "en", "fr", "nb"]


@pytest.mark.parametrize(
    ("completion", "language", "mode"),
    [
        ("Hovedstaden i Danmark hedder København, og den ligger på Sjælland.", "da", RIGHT),
        ("De hoofdstad van Nederland is Amsterdam, een stad met veel grachten.", "nl", RIGHT),
        ("The capital of Denmark is Copenhagen, which lies on an island.", "da", WRONG),
        ("Amsterdam.", "nl", UNKNOWN),
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14", "en", UNKNOWN),
    ],
)
def test_languages_are_told_apart_and_short_texts_are_not_judged(completion, language, mode):
    assert language_mode(found_language(completion, AMONG), language) == mode


def test_many_at_once_are_what_they_are_alone():
    texts = [
        "Amsterdam.",
        "The capital of Denmark is Copenhagen.",
        "Amsterdam.",
        "La capitale du Danemark est Copenhague.",
    ]
    assert found_languages(texts, AMONG) == [found_language(text, AMONG) for text in texts]
