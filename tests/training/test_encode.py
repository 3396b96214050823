"""Pairs as token ids: the sampled ids are the ids trained on, and nothing is cut silently."""

import polars as pl
import pytest

from croco.errors import UserError
from croco.sampling.chat import prompt_ids
from croco.training.encode import encode_pairs, held_out
from tiny import make_tokenizer
from training.pairs import make_pairs

TOKENIZER = make_tokenizer()
END = TOKENIZER.eos_token_id


def encode(pairs, **settings):
    return encode_pairs(pairs, TOKENIZER, **{"end": END, "max_tokens": 200, **settings})


def test_text_is_tokenised_and_closed_by_the_end_token():
    pairs = make_pairs(3)
    examples, dropped = encode(pairs, instructions={"da": "Svar på dansk."})
    assert dropped.is_empty()
    for example, row in zip(examples, pairs.iter_rows(named=True), strict=True):
        instruction = "Svar på dansk." if row["language"] == "da" else None
        assert example.prompt == prompt_ids(TOKENIZER, row["messages"], instruction)
        for ids, side in zip(example.completions, ("chosen", "rejected"), strict=True):
            assert ids[-1] == END
            assert TOKENIZER.decode(ids[:-1]) == row[side]


def test_sampled_ids_win_over_text():
    pairs = make_pairs(1).with_columns(
        pl.Series("chosen_ids", [[40, 41, 42]], dtype=pl.List(pl.Int32)),
        pl.Series("rejected_ids", [None], dtype=pl.List(pl.Int32)),
    )
    (example,), _ = encode(pairs)
    assert example.completions[0] == [40, 41, 42, END]
    assert TOKENIZER.decode(example.completions[1][:-1]) == pairs["rejected"][0]


def test_supervised_tuning_reads_the_chosen_only():
    (example,), _ = encode(make_pairs(1).drop("rejected"), chosen_only=True)
    assert len(example.completions) == 1


def test_what_does_not_fit_goes_to_the_ledger_with_its_reason():
    pairs = make_pairs(4).with_columns(
        chosen=pl.Series(["fine", "", "long " * 300, "same x"]),
        rejected=pl.Series(["other", "x", "x", "same x"]),
    )
    examples, dropped = encode(pairs)
    assert len(examples) == 1
    assert dropped["unit"].to_list() == ["pair"] * 3
    empty, long, same = dropped["reason"]
    assert "empty" in empty
    assert "more than max_tokens 200" in long
    assert "same" in same
    assert dropped["prompt_id"].to_list() == pairs["prompt_id"].to_list()[1:]


def test_the_longer_completion_counts_to_the_last_token():
    (example,), _ = encode(make_pairs(1))
    longest = len(example.prompt) + max(map(len, example.completions))
    assert len(encode(make_pairs(1), max_tokens=longest)[0]) == 1
    assert len(encode(make_pairs(1), max_tokens=longest - 1)[0]) == 0


def test_a_missing_column_is_named():
    with pytest.raises(UserError, match="no column 'rejected'"):
        encode(make_pairs(1).drop("rejected"))


def test_held_out_prompts_are_a_fraction_and_grow_with_it():
    ids = [f"prompt-{i}" for i in range(2000)]
    tenth, fifth = ({i for i in ids if held_out(i, share)} for share in (0.1, 0.2))
    assert 150 < len(tenth) < 250
    assert tenth < fifth
    assert not any(held_out(i, 0.0) for i in ids)
