import numpy as np
import polars as pl
import pytest

from croco.errors import UserError
from croco.pairing.pools import build_pools


def rows(*entries: tuple[str, str, int, float]) -> pl.DataFrame:
    schema = {"prompt_id": pl.String, "language": pl.String, "sample_id": pl.Int32, "score": pl.Float32}
    return pl.DataFrame(list(entries), schema=schema, orient="row")


def test_pool_statistics_by_hand():
    pools = build_pools(
        rows(("p", "da", 0, 1.0), ("p", "da", 1, 3.0), ("p", "nl", 0, 8.0), ("q", "da", 0, 5.0)), "language"
    )
    assert pools.mean.tolist() == [2.0, 8.0, 5.0]
    assert pools.std.tolist() == [1.0, 0.0, 0.0]  # population: ddof 0
    assert pools.sizes.tolist() == [2, 1, 1]
    crossed = build_pools(pools.rows, "all")
    assert crossed.mean.tolist() == [4.0, 5.0]
    assert crossed.std[0] == pytest.approx(np.sqrt((9 + 1 + 16) / 3))


def test_prompts_with_the_same_text_under_two_ids_stay_apart():
    pools = build_pools(rows(("p1", "da", 0, 1.0), ("p2", "da", 0, 2.0)), "all")
    assert pools.num_pools == 2


def test_rows_come_out_in_key_order():
    pools = build_pools(
        rows(("b", "nl", 0, 1.0), ("a", "nl", 1, 2.0), ("a", "nl", 0, 3.0), ("a", "da", 5, 4.0)), "all"
    )
    assert pools.rows.select("prompt_id", "language", "sample_id").rows() == [
        ("a", "da", 5), ("a", "nl", 0), ("a", "nl", 1), ("b", "nl", 0),
    ]  # fmt: skip


def test_a_large_mean_does_not_swallow_the_spread():
    pools = build_pools(rows(*(("p", "da", i, 10_000.0 + i) for i in range(3))), "language")
    assert pools.std[0] == pytest.approx(np.sqrt(2 / 3), rel=1e-12)


def test_a_key_that_occurs_twice_is_named():
    with pytest.raises(UserError, match="prompt_id 'p', language 'da', sample_id 3 more than once"):
        build_pools(rows(("p", "da", 3, 1.0), ("q", "da", 3, 1.0), ("p", "da", 3, 2.0)), "language")


def test_a_score_that_is_no_number_is_named():
    with pytest.raises(UserError, match="prompt_id 'p', language 'da', sample_id 1 is nan"):
        build_pools(rows(("p", "da", 0, 1.0), ("p", "da", 1, float("nan"))), "language")


def test_an_unknown_pool_is_an_error():
    with pytest.raises(UserError, match='pool "nordic" is unknown'):
        build_pools(rows(("p", "da", 0, 1.0)), "nordic")


def test_no_candidates_make_no_pools():
    assert build_pools(rows(), "all").num_pools == 0
