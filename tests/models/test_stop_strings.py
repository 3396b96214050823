"""Where a stop string cuts a completion: whole tokens before it, whatever came after."""

import polars as pl
import pytest
from typer.testing import CliRunner

from conftest import write_recipe
from croco.cli.main import app
from croco.models.protocols import Decoding, Request
from croco.models.stop_strings import Stops, finished
from croco.models.transformers import HFSampler
from croco.storage.shards import read_table
from tiny import make_policy, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def ids_of(tokenizer, *pieces: str) -> list[int]:
    """Each piece tokenised by itself, so that a test knows where tokens begin."""
    return [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]


def test_the_string_its_tokens_and_what_follows_are_left_out(tokenizer):
    before, string, after = (ids_of(tokenizer, text) for text in ("April.", "\n\n", "Which month"))
    found = finished(before + string + after, "length", 9, Stops(tokenizer, ("\n\n", "never")))
    assert (found.ids, found.finish_reason, found.seed) == (before, "stop", 9)
    assert found.num_tokens == len(before) + len(string)


def test_a_token_that_the_string_begins_inside_goes_too(tokenizer):
    token = next(
        t for t in range(len(tokenizer)) if len(word := tokenizer.decode([t])) == 3 and word.isalpha()
    )
    ids = [*ids_of(tokenizer, "Which"), token, *ids_of(tokenizer, " comes")]
    found = finished(ids, "stop", 0, Stops(tokenizer, (word[1:] + " c",)))
    assert tokenizer.decode(found.ids) == "Which"


def test_the_first_string_in_the_text_counts_not_the_first_in_the_list(tokenizer):
    ids = ids_of(tokenizer, "a", "b", "c", "d")
    assert finished(ids, "length", 0, Stops(tokenizer, ("d", "b"))).ids == ids[:1]
    # both end with the same token: the one that begins first
    assert finished(ids, "length", 0, Stops(tokenizer, ("c", "bc"))).ids == ids[:1]


def test_a_cut_leaves_no_half_character(tokenizer):
    ids = ids_of(tokenizer, "x", "語", "。")  # characters of several tokens each
    assert len(ids) > 3
    stops = Stops(tokenizer, ("。",))
    assert tokenizer.decode(finished(ids, "length", 0, stops).ids) == "x語"
    assert stops.cut(ids[:-1]) is None
    assert stops.near_end(ids)


def test_without_a_stop_string_nothing_changes(tokenizer):
    ids = ids_of(tokenizer, "April.")
    for stops in (None, Stops(tokenizer, ("March",))):
        found = finished(ids, "length", 1, stops)
        assert (found.ids, found.finish_reason, found.num_tokens) == (ids, "length", None)
    assert finished([], "stop", 1, Stops(tokenizer, ("x",))).ids == []


@pytest.mark.parametrize("path", ["shared-prefix", "plain"])
def test_a_special_token_ends_a_completion_too(tokenizer, path):
    """No text of a completion shows one, so as a string it would never be found."""
    sampler = HFSampler(make_policy("llama"), tokenizer)
    sampler.path, user = path, tokenizer.convert_tokens_to_ids("<|user|>")
    asked = [Request(0, [1, 5, 6, 7], list(range(60)))]
    drawn = {
        stop: dict(sampler.sample(asked, Decoding(1.0, 1.0, 0, 40, stop)))[0] for stop in ((), ("<|user|>",))
    }
    assert any(user in free.ids for free in drawn[()])
    for free, found in zip(drawn[()], drawn["<|user|>",], strict=True):
        if user in free.ids:
            at = free.ids.index(user)
            assert (found.ids, found.finish_reason, found.completion_tokens) == (
                free.ids[:at],
                "stop",
                at + 1,
            )
        else:
            assert found == free


def test_the_stage_ends_completions_at_the_recipes_strings(tmp_path, tiny_models):
    path, stop = str(write_recipe(tmp_path, tiny_models)), ("e", "a", "n", "2")
    for command in ("prompts", "sample"):
        found = CliRunner().invoke(app, [command, path, "--set", f"sampling.stop={list(stop)}"])
        assert found.exit_code == 0, found.output
    table, tokenizer = read_table(tmp_path / "run" / "sample"), make_tokenizer()
    assert table.filter(pl.col("finish_reason") == "stop").height > table.height / 2
    for text, ids, tokens in table.select("completion", "completion_ids", "completion_tokens").iter_rows():
        assert not set(stop) & set(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokens >= len(ids)
