"""The chat template is applied in one place: instruction, special tokens, prefix check, and what it refuses."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from croco.errors import UserError
from croco.models.chat_template import (
    check_markup,
    check_prefix,
    completions_ids,
    conversation_ids,
    conversations_ids,
    end_id,
    end_ids,
    prompt_ids,
    same_ids,
    text_ids,
    with_instruction,
)
from tiny import CHAT_TEMPLATE, make_policy, make_tokenizer

USER = [{"role": "user", "content": "Which month comes after March?"}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hej."},
    {"role": "assistant", "content": "Hej!"},
    {"role": "user", "content": "Hvad nu?"},
    {"role": "tool", "content": "42"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_a_prompt_has_one_bos_and_opens_the_assistants_turn(tokenizer):
    ids = prompt_ids(tokenizer, USER)
    assert tokenizer.decode(ids) == "<|bos|><|user|>Which month comes after March?<|end|><|assistant|>"
    assert ids.count(tokenizer.bos_token_id) == 1


def test_every_turn_is_kept_and_the_instruction_stands_in_the_last_user_turn(tokenizer):
    text = tokenizer.decode(prompt_ids(tokenizer, TURNS, "Svar på dansk."))
    assert text == (
        "<|bos|><|system|>Be brief.<|end|><|user|>Hej.<|end|><|assistant|>Hej!<|end|>"
        "<|user|>Hvad nu?\n\nSvar på dansk.<|end|><|tool|>42<|end|><|assistant|>"
    )
    assert TURNS[3]["content"] == "Hvad nu?"


def test_an_instruction_without_a_user_turn_is_an_error():
    with pytest.raises(UserError, match=r"is for a user turn.*found system"):
        with_instruction([{"role": "system", "content": "x"}], "Svar på dansk.")


def test_a_conversation_continues_its_prompt(tokenizer):
    prompt, whole = prompt_ids(tokenizer, USER), conversation_ids(tokenizer, USER, "April.")
    check_prefix(tokenizer, prompt, whole)
    assert tokenizer.decode(whole[len(prompt) :]) == "April.<|end|>"
    texts = ["April.", "", "Après mars, c'est avril."]
    assert conversations_ids(tokenizer, USER, texts) == [
        conversation_ids(tokenizer, USER, text) for text in texts
    ]


def test_a_prompt_that_is_no_prefix_is_an_error_that_shows_both():
    template = (
        "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|tool|>{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.raises(UserError) as caught:
        check_prefix(tokenizer, prompt_ids(tokenizer, USER), conversation_ids(tokenizer, USER, "April."))
    assert "March?<|end|><|tool|>" in str(caught.value)
    assert "March?<|end|>April.<|end|>" in str(caught.value)


def test_a_missing_or_refusing_template_is_an_error(tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        prompt_ids(make_tokenizer(chat_template=None), USER)
    with pytest.raises(
        UserError, match=r"refused by the chat template: unknown role narrator .roles narrator."
    ):
        prompt_ids(tokenizer, [{"role": "narrator", "content": "x"}])
    with pytest.raises(UserError, match="without messages"):
        prompt_ids(tokenizer, [])


def test_end_tokens_come_from_the_generation_config_and_the_tokenizer(tokenizer):
    config = make_policy().generation_config
    assert end_ids(tokenizer, config) == {2}
    config.eos_token_id = [7, 0]
    assert end_ids(tokenizer, config) == {0, 2, 7}
    assert end_id(tokenizer, config) == 2  # what the template closes the assistant's turn with
    other = make_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}<|tool|>{% endfor %}")
    config.eos_token_id = other.convert_tokens_to_ids("<|tool|>")
    assert end_id(other, config) == config.eos_token_id


CLOSED = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}CLOSING{% endfor %}"


@pytest.mark.parametrize(
    ("closing", "configured", "ends", "closes"),
    [
        ("<|end|>\n", 1, {1, 2}, 2),  # Qwen 2.5's base: neither tokenizer nor config has the end of a turn
        ("<|end|>\n<|bos|>", [2, 1], {1, 2}, 2),  # Phi 3: the whole ends otherwise than the turn
        ("<|tool|><|bos|>", 1, {1}, 1),  # Cohere 2: a completion ends before the turn does
        ("\n", 1, {1}, 1),
    ],
)
def test_the_token_that_closes_a_turn_ends_a_completion(closing, configured, ends, closes):
    tokenizer, config = (
        make_tokenizer(chat_template=CLOSED.replace("CLOSING", closing)),
        make_policy().generation_config,
    )
    tokenizer.eos_token, config.eos_token_id = "<|bos|>", configured
    assert end_ids(tokenizer, config) == ends
    assert end_id(tokenizer, config) == closes


def test_a_model_without_end_token_is_an_error():
    tokenizer, config = (
        make_tokenizer(chat_template=CLOSED.replace("CLOSING", "")),
        make_policy().generation_config,
    )
    tokenizer.eos_token = config.eos_token_id = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        end_ids(tokenizer, config)


def test_ids_mean_the_same_where_words_and_rules_are_the_same(tokenizer):
    assert same_ids(tokenizer, make_tokenizer(chat_template=None))
    assert not same_ids(tokenizer, make_tokenizer(vocab_size=300))
    other = make_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()  # the same words, found otherwise
    assert other.get_vocab() == tokenizer.get_vocab()
    assert not same_ids(tokenizer, other)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer of Llama 2's kind, which puts a space before every text."""
    words = ["▁", "▁a", "▁b", "<", "|", "e", "n", "d", ">", "a", "b", "\n", "u", "s", "r", "▁<", "x", "▁x"]
    specials = ["<unk>", "<s>", "<|end|>", "<|user|>"]
    core = Tokenizer(models.BPE({word: at for at, word in enumerate([*specials, *words])},
                                [("▁", "a"), ("▁", "b"), ("▁", "<"), ("▁", "x")], unk_token="<unk>"))  # fmt: skip
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|end|>", unk_token="<unk>",
        extra_special_tokens=["<|user|>"],
    )  # fmt: skip
    made.chat_template = "<s>{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    return made


@pytest.mark.parametrize(
    "tokenizer", [make_tokenizer(), sentencepiece_like()], ids=["bytes", "sentencepiece"]
)
def test_special_tokens_in_a_text_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    special = set(tokenizer.all_special_ids)
    for text in ("a <|end|>b", "<|user|>", "<|end|><|end|>", "<|en<|end|>d|>", "<|us<|user|>er|>a"):
        ids = prompt_ids(tokenizer, [{"role": "user", "content": text}])
        plain = prompt_ids(tokenizer, [{"role": "user", "content": "a b"}])
        kept = [token for token in ids if token in special]
        assert kept == [token for token in plain if token in special], text
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
        (alone,) = text_ids(tokenizer, [text])
        assert not special & set(alone)
        assert tokenizer.decode(alone).strip() == text
        turns = [{"role": "user", "content": "a b"}]
        whole, short = (conversation_ids(tokenizer, turns, completion) for completion in (text, "a"))
        assert [t for t in whole if t in special] == [t for t in short if t in special]
    ordinary = "a b x"
    assert text_ids(tokenizer, [ordinary]) == tokenizer([ordinary], add_special_tokens=False)["input_ids"]


def test_prompts_that_carry_the_markup_already_are_refused(tokenizer):
    done = [[{"role": "user", "content": f" <|bos|><|user|>Hej {i}<|end|><|assistant|>"}] for i in range(3)]
    with pytest.raises(
        UserError, match=r"2 of 3 prompts carry the model's chat markup already.*<.user.>Hej 0"
    ):
        check_markup(tokenizer, [*done[:2], USER])
    check_markup(tokenizer, [done[0], USER, TURNS])  # one of many only speaks of it


def test_what_the_template_looks_for_in_a_message_stays_a_token():
    template = (
        "{% for m in messages %}<|user|>{% if '<|tool|>' in m['content'] %}"
        "{{ m['content'].split('<|tool|>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|end|>{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    said = prompt_ids(tokenizer, [{"role": "user", "content": "thought<|tool|>Hej<|end|>"}])
    assert tokenizer.decode(said) == "<|user|>Hej<|end|><|end|>"
    assert said.count(tokenizer.eos_token_id) == 1


def test_a_completion_that_the_template_refuses_is_tokenised_alone() -> None:
    refusing = "{% if messages[-1]['content'] == 'no' %}{{ raise_exception('never') }}{% endif %}" + STRIPPING
    tokenizer = make_tokenizer(chat_template=refusing)
    assert completions_ids(tokenizer, USER, ["no"]) == text_ids(tokenizer, ["no"])


THINKING = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] }}",
)
STRIPPING = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
SPACE = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}", "{% if message['role'] == 'assistant' %} {% endif %}{{ message['content'] }}"
)


@pytest.mark.parametrize(
    ("template", "written"),
    [(CHAT_TEMPLATE, " April. "), (THINKING, "<think>\n\n</think>\n\n April. "), (STRIPPING, "April."),
     (SPACE, "  April. ")],
    ids=["as it is", "thinking", "stripping", "space"],
)  # fmt: skip
def test_a_completion_in_text_is_what_the_template_makes_of_it(template: str, written: str) -> None:
    assert template is CHAT_TEMPLATE or template != CHAT_TEMPLATE
    tokenizer = make_tokenizer(chat_template=template)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Which month?"}]
    ids, other = completions_ids(tokenizer, messages, [" April. ", "May"])
    assert tokenizer.decode(ids) == written
    # as a whole conversation is tokenised, up to the end of the turn
    whole = conversation_ids(tokenizer, messages, " April. ")
    prompt = prompt_ids(tokenizer, messages)
    tail = whole[len(prompt) :]
    assert whole[: len(prompt)] == prompt
    assert tail[: tail.index(tokenizer.eos_token_id)] == ids
    assert tokenizer.decode(other).endswith("May")
