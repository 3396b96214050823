"""Pairs as token ids: the sampled ids are the ids trained on, and nothing is cut silently."""

import polars as pl
import pytest

from croco.errors import UserError
from croco.models.chat_template import prompt_ids
from croco.stages.train.encode import encode_pairs, held_out
from stages.train.pairs import make_pairs
from tiny import make_tokenizer

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


def test_sampled_ids_win_over_text_they_spell():
    pairs = make_pairs(1).with_columns(
        pl.Series("chosen_ids", [[40, 41, 42]], dtype=pl.List(pl.Int32)),
        pl.lit(TOKENIZER.decode([40, 41, 42])).alias("chosen"),
        pl.Series("rejected_ids", [None], dtype=pl.List(pl.Int32)),
    )
    (example,), _ = encode(pairs)
    assert example.completions[0] == [40, 41, 42, END]
    assert TOKENIZER.decode(example.completions[1][:-1]) == pairs["rejected"][0]


def test_ids_that_spell_another_text_are_not_trained_on():
    pairs = make_pairs(1)
    plain, _ = encode(pairs)
    foreign = pairs.with_columns(pl.Series("chosen_ids", [[40, 41, 42]], dtype=pl.List(pl.Int32)))
    assert encode(foreign)[0][0].completions == plain[0].completions
    outside = foreign.with_columns(
        pl.Series("chosen_ids", [[999_999, 5]], dtype=pl.List(pl.Int32)), where=pl.lit("f.jsonl, line 1")
    )
    with pytest.raises(
        UserError, match=r"^f\.jsonl, line 1: chosen_ids holds 999999, and the policy has the ids"
    ):
        encode(outside)


def test_finish_reasons_of_other_tools_close_a_completion():
    pairs = make_pairs(1).with_columns(
        chosen_finish_reason=pl.lit("end_turn"), rejected_finish_reason=pl.lit("max_tokens")
    )
    (example,), _ = encode(pairs)
    assert [ids[-1] == END for ids in example.completions] == [True, False]


def test_supervised_tuning_reads_the_chosen_only():
    (example,), _ = encode(make_pairs(1).drop("rejected"), chosen_only=True)
    assert len(example.completions) == 1


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which month?"},
    {"role": "assistant", "content": "March."},
    {"role": "user", "content": "And after it?"},
]


def learnt(example) -> list[str]:
    """The stretches of text that are learnt."""
    (ids,) = example.completions
    mask = example.learnt or (True,) * len(ids)
    stretches = [[]]
    for token, kept in zip(ids, mask, strict=True):
        if kept:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [TOKENIZER.decode(stretch) for stretch in stretches if stretch]


def test_supervised_tuning_learns_the_completion_every_turn_or_all():
    pairs = pl.DataFrame([{"prompt_id": "p", "language": "en", "messages": TURNS, "chosen": "April."}])
    whole = TOKENIZER.apply_chat_template(
        [*TURNS, {"role": "assistant", "content": "April."}], tokenize=False
    )
    (completion,), _ = encode(pairs, chosen_only=True)
    assert learnt(completion) == ["April.<|end|>"]
    (turns,), _ = encode(pairs, chosen_only=True, sft_on="assistant")
    assert learnt(turns) == ["March.<|end|>", "April.<|end|>"]
    # an instruction stands in the last user turn, which may come before a turn of the assistant
    turns_and_tool = [*TURNS[:3], {"role": "tool", "content": "7"}]
    called = pairs.with_columns(language=pl.lit("da"), messages=pl.Series([turns_and_tool]))
    (told,), _ = encode(called, chosen_only=True, sft_on="assistant", instructions={"da": "Svar på dansk."})
    assert learnt(told) == ["March.<|end|>", "April.<|end|>"]
    (everything,), _ = encode(pairs, chosen_only=True, sft_on="conversation")
    assert learnt(everything) == [whole.removeprefix("<|bos|>")]
    for one in (turns, everything):
        assert [*one.prompt, *one.completions[0]] == [*completion.prompt, *completion.completions[0]]
    assert [one.num_learnt for one in (completion, turns)] == [
        len(completion.completions[0]),
        sum(turns.learnt),
    ]


def test_a_template_that_hides_an_earlier_turn_puts_it_into_the_ledger():
    hiding = make_tokenizer(
        chat_template="{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<|{{ m.role }}|>"
        "{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    pairs = pl.DataFrame([{"prompt_id": "p", "language": "en", "messages": TURNS, "chosen": "April."}])
    examples, dropped = encode_pairs(
        pairs, hiding, end=END, max_tokens=200, chosen_only=True, sft_on="assistant"
    )
    assert not examples
    assert dropped["reason"].to_list() == [
        "the chat template does not show where an earlier turn of the assistant begins and ends"
    ]


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


def test_a_completion_that_was_stopped_gets_no_end_token():
    pairs = make_pairs(2).with_columns(
        chosen_finish_reason=pl.Series(["stop", "length"]), rejected_finish_reason=pl.Series(["length", None])
    )
    first, second = encode(pairs)[0]
    assert [ids[-1] == END for ids in first.completions] == [True, False]
    assert [ids[-1] == END for ids in second.completions] == [False, True]
    assert TOKENIZER.decode(second.completions[0]) == pairs["chosen"][1]


def test_a_stopped_completion_without_tokens_is_empty_too():
    pairs = make_pairs(1).with_columns(chosen=pl.lit(""), chosen_finish_reason=pl.lit("length"))
    assert "empty" in encode(pairs)[1]["reason"][0]


def test_truncation_takes_the_end_of_completions_and_is_counted():
    pairs = make_pairs(1).with_columns(chosen=pl.lit("April " * 40), rejected=pl.lit("maj"))
    (whole,), _ = encode(pairs, max_tokens=1000)
    limit = len(whole.prompt) + 12
    (cut,), dropped = encode(pairs, max_tokens=limit, over_length="truncate")
    assert dropped.is_empty()
    assert cut.prompt == whole.prompt
    assert cut.completions == (whole.completions[0][:12], whole.completions[1])
    assert cut.completions[0][-1] != END
    assert cut.cut_tokens == len(whole.completions[0]) - 12
    assert whole.cut_tokens == 0


def test_what_cannot_be_cut_to_fit_is_left_out():
    pairs = make_pairs(2).with_columns(
        chosen=pl.lit("April " * 40 + "x"), rejected=pl.lit("April " * 40 + "y")
    )
    (first, second), _ = encode(pairs, max_tokens=1000)
    assert len(first.prompt) != len(second.prompt)
    limit = max(len(first.prompt), len(second.prompt))
    examples, dropped = encode(pairs, max_tokens=limit, over_length="truncate")
    assert not examples
    reasons = dict(zip((len(first.prompt), len(second.prompt)), dropped["reason"], strict=True))
    assert f"leaves none of max_tokens {limit}" in reasons.pop(limit)
    assert reasons.popitem()[1] == "chosen and rejected are the same tokens"


def test_system_tool_and_earlier_turns_are_part_of_the_prompt():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hej."},
        {"role": "assistant", "content": "Hej!"},
        {"role": "user", "content": "Hvad nu?"},
        {"role": "tool", "content": "42"},
    ]
    pairs = make_pairs(1).with_columns(messages=pl.Series([turns]))
    (example,), _ = encode(pairs)
    assert TOKENIZER.decode(example.prompt) == (
        "<|bos|><|system|>Be brief.<|end|><|user|>Hej.<|end|><|assistant|>Hej!<|end|>"
        "<|user|>Hvad nu?<|end|><|tool|>42<|end|><|assistant|>"
    )


def test_a_tokenizer_without_template_is_an_error_that_names_the_prompt():
    with pytest.raises(UserError, match=r"prompt 'p0' in en: .*no chat template"):
        encode_pairs(make_pairs(1), make_tokenizer(chat_template=None), end=END, max_tokens=200)


def test_a_template_whose_prompt_is_no_prefix_is_an_error_that_shows_both():
    # Sound for a user turn alone, broken after a system turn: the mistake shows at the second pair.
    broken = make_tokenizer(
        chat_template=(
            "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}"
            "{% if messages[0]['role'] == 'system' %}<|tool|>{% else %}<|assistant|>{% endif %}{% endif %}"
        )
    )
    user = {"role": "user", "content": "Hej."}
    pairs = make_pairs(2).with_columns(
        messages=pl.Series([[user], [{"role": "system", "content": "Kort."}, user]])
    )
    assert encode_pairs(pairs[:1], broken, end=END, max_tokens=200)[1].is_empty()
    with pytest.raises(UserError) as caught:
        encode_pairs(pairs, broken, end=END, max_tokens=200)
    message = str(caught.value)
    assert "prompt 'p0' in da" in message
    assert "<|user|>Hej.<|end|><|tool|>'" in message
    assert "<|user|>Hej.<|end|><|assistant|>Ja." in message


def test_a_token_that_the_policy_has_no_embedding_for_is_named():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zq"])
    pairs = make_pairs(2).with_columns(rejected=pl.lit("April zq"))
    with pytest.raises(
        UserError, match=r"prompt 'p0' in en has the token 320, .* embeddings for 320 tokens only"
    ):
        encode_pairs(pairs, tokenizer, end=2, max_tokens=200, num_ids=320)


def test_a_missing_column_is_named():
    with pytest.raises(UserError, match="no column 'rejected'"):
        encode(make_pairs(1).drop("rejected"))


def test_held_out_prompts_are_a_fraction_and_grow_with_it():
    ids = [f"prompt-{i}" for i in range(2000)]
    tenth, fifth = ({i for i in ids if held_out(i, share)} for share in (0.1, 0.2))
    assert 150 < len(tenth) < 250
    assert tenth < fifth
    assert not any(held_out(i, 0.0) for i in ids)
