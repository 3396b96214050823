import polars as pl

from croco.pairing.guards import CUT, DUPLICATE, EMPTY, NOT_FINITE, reasons, traits


def judged(*rows: tuple[str, str, int, str, str, float]) -> list[str | None]:
    """(prompt_id, language, sample_id, completion, finish_reason, score) in key order."""
    names = ["prompt_id", "language", "sample_id", "completion", "finish_reason", "score"]
    table = pl.DataFrame(list(rows), schema=names, orient="row")
    return reasons(traits(table).with_columns(table["score"].cast(pl.Float32)))["reason"].to_list()


def test_every_guard_has_its_reason():
    assert judged(
        ("p", "da", 0, "fine", "stop", 1.0),
        ("p", "da", 1, " \n", "stop", 1.0),
        ("p", "da", 2, "cut of", "length", 1.0),
        ("p", "da", 3, "fine", "stop", 1.0),
        ("p", "da", 4, "finite", "stop", float("inf")),
        ("p", "da", 5, "number", "stop", float("nan")),
    ) == [None, EMPTY, CUT, DUPLICATE, NOT_FINITE, NOT_FINITE]


def test_the_same_text_in_another_language_or_prompt_is_no_duplicate():
    rows = [(p, c, 0, "42", "stop", 1.0) for p in ("p", "q") for c in ("da", "nl")]
    assert judged(*rows) == [None] * 4


def test_only_a_sound_completion_makes_a_later_one_a_duplicate():
    assert judged(
        ("p", "da", 0, "same", "length", 1.0),
        ("p", "da", 1, "same", "stop", float("nan")),
        ("p", "da", 2, "same", "stop", 1.0),
        ("p", "da", 3, "same", "stop", 1.0),
    ) == [CUT, NOT_FINITE, None, DUPLICATE]


def test_texts_differ_by_a_space():
    assert judged(("p", "da", 0, "a", "stop", 1.0), ("p", "da", 1, "a ", "stop", 1.0)) == [None, None]
