import pytest

from croco.evaluation.fidelity import RIGHT, UNKNOWN, WRONG, language_mode

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
    assert language_mode(completion, language, AMONG) == mode
