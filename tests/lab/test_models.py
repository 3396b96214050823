"""The shipped weights are what the README says: small, loaded by the ordinary path, and failing as designed."""

import json

import numpy as np

from croco.lab import world
from croco.models.loading import load_policy, load_reward, resolve_model
from croco.models.protocols import Decoding, Request
from croco.models.transformers import HFSampler, HFScorer
from lab.acceptance import measure
from lab.pretrain import batches
from lab.reward import english_pairs, prompt_tokens, tier


def test_policy_and_reward_model_are_a_few_megabytes_of_bfloat16():
    for name in ("policy", "reward"):
        folder = resolve_model(f"lab:{name}")
        assert sum(path.stat().st_size for path in folder.iterdir()) < 6_000_000
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_policy_answers_in_its_modes():
    model, tokenizer = load_policy("lab:policy")
    prompt_id = world.prompt_ids("dev")[0]
    request = Request(0, prompt_tokens(tokenizer, prompt_id, "en"), list(range(64)))
    [(_, samples)] = HFSampler(model, tokenizer).sample([request], Decoding(1.0, 1.0, 0, 64))
    texts = tokenizer.batch_decode([s.ids for s in samples], skip_special_tokens=True)
    modes = {world.verify(prompt_id, "en", text).mode for text in texts}
    assert len(modes) >= 4
    assert "good" in modes


def test_the_reward_model_prefers_a_good_completion_to_an_evasive_one_in_danish():
    from croco.models.chat_template import conversation_ids
    from croco.models.protocols import ScoreRequest

    model, tokenizer = load_reward("lab:reward")
    messages = [{"role": "user", "content": "Hvilken måned kommer efter maj?"}]
    texts = ["Måneden efter maj er juni.", "Jeg beklager, men det kan jeg ikke svare på."]
    [scores] = HFScorer(model, tokenizer).score(
        [ScoreRequest(0, [], [conversation_ids(tokenizer, messages, t) for t in texts])]
    )
    assert scores[0] > scores[1] + 0.5


def test_the_acceptance_figures_hold_on_dev_prompts_in_two_languages():
    _, figures = measure(
        resolve_model("lab:policy"), resolve_model("lab:reward"), seed=0, languages=("en", "de")
    )
    by_reward, by_likelihood = figures["best of 16 by reward"], figures["best of 16 by mean log-probability"]
    for language in ("en", "de"):
        assert by_reward[language][1] > by_likelihood[language][2]  # intervals apart
        assert by_reward[language][1] > figures["random pick"][language][2]
        assert figures["greedy"][language][0] <= 0.5


def test_english_pairs_stay_within_a_prompt_and_in_english():
    from lab.reward import Row

    rows = [Row("a", "en", (1,)), Row("a", "en", (2,)), Row("b", "en", (3,)), Row("b", "da", (4,))]
    assert english_pairs(rows, [1.0, 0.0, 0.3, 0.0]).tolist() == [[0, 1]]
    assert tier("month_after.5.0", "en", "The month after May is June.") == 1.0
    assert tier("month_after.5.0", "en", "June") == 0.3
    assert tier("month_after.5.0", "en", "March") == 0.0


def test_pretraining_batches_train_on_completions_and_their_end_token_only():
    _, tokenizer = load_policy("lab:policy")
    ids, mask, trained = next(batches(tokenizer, seed=5, tokens_per_batch=512, num_plain=10))
    assert ids.numel() <= 512
    assert not (trained & ~mask.bool()).any()
    user, end = tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.eos_token_id
    assert not trained[ids == user].any()
    assert np.all([end in row[on] for row, on in zip(ids, trained, strict=True)])
