"""Pretraining in the lists world: what is trained on, the optimizer and attention against torch's, a short training."""

import time
from itertools import islice

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, PreTrainedTokenizerFast

from lab.list_corpus import Habits, documents
from lab.list_training import IGNORED, LENGTHS, Muon, Setup, Steps, Supply, _causal, arrays, chunks, train
from lab.pretrain import new_model, train_tokenizer

SMALL = Setup(3, Habits(), tokens_per_batch=512, workers=0, chunks=4, documents_per_chunk=400)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(1, 6000, documents, 1536)


def test_rows_hold_every_document_and_train_on_completions_and_their_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts, ends = [], 0
    for ids_NT, labels_NT in arrays(tokenizer, SMALL, 1):
        assert ids_NT.shape == labels_NT.shape
        for ids, labels in zip(ids_NT, labels_NT, strict=True):
            trained = labels != IGNORED
            assert (labels[trained] == ids[trained]).all()
            assert (ids[trained] != tokenizer.pad_token_id).all()
            texts.append(tokenizer.decode(ids[trained], skip_special_tokens=True))
            ends += int((labels == tokenizer.eos_token_id).sum())
    wanted = list(islice(documents(3001, habits=Habits()), 400))
    endless = [d[-1]["content"] for d in wanted if "endless" in d[-1]]
    whole = [d[-1]["content"] for d in wanted if "endless" not in d[-1]]
    assert ends == len(whole)
    assert set(whole) <= set(texts)
    assert all(any(text.startswith(t) for t in texts if len(t) > 60) for text in endless)


def test_plain_chunks_have_no_bad_habit_and_workers_make_the_same_ones(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    alone = [arrays(tokenizer, SMALL, number) for number in range(4)]
    with chunks(tokenizer, Setup(3, Habits(), 512, workers=1, chunks=4, documents_per_chunk=400)) as made:
        for one, other in zip(alone, made, strict=True):
            for (a, b), (c, d) in zip(one, other, strict=True):
                assert np.array_equal(a, c)
                assert np.array_equal(b, d)
    with chunks(tokenizer, SMALL) as made:
        supply = Supply(made, SMALL, "cpu")
        which, ids, labels = supply.batch(plain=False)
        assert supply.received == 2  # the first chunk is plain
        assert ids.shape == labels.shape == (512 // LENGTHS[which], LENGTHS[which])
        while supply.take(wait=True):
            pass
        assert supply.received == 4
        assert sum(len(ids) for ids, _ in supply.stored[False]) == 1200


def test_muon_does_what_torchs_does() -> None:
    torch.manual_seed(0)
    shapes = [(32, 16), (16, 16), (32, 16), (16, 40)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    muon, twin = Muon(ours, torch.tensor(0.02)), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        muon.step()
        twin.step()
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() < 2e-3  # bfloat16 products in another order; a step changes 0.02


def test_attention_without_a_mask_is_the_models_own_on_rows_padded_on_the_right(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    AttentionInterface.register("lists_causal", _causal)
    model, ids = new_model(tokenizer, 0, 64, 2), torch.randint(10, 700, (3, 24))
    with torch.no_grad():
        wanted = model(ids, attention_mask=torch.ones_like(ids)).logits
        model.set_attn_implementation("lists_causal")
        assert torch.allclose(model(ids).logits, wanted, atol=1e-5)


def test_a_model_learns_until_its_time_is_over_and_rates_end_low(tokenizer: PreTrainedTokenizerFast) -> None:
    model, said, started = new_model(tokenizer, 0, 64, 2), [], time.monotonic()
    with chunks(tokenizer, SMALL) as made:
        steps = train(model, Supply(made, SMALL, "cpu"), SMALL, started + 6, "cpu", said.append)
    assert time.monotonic() - started < 12
    assert steps > 5
    assert float(said[-1].split()[-1]) < 6  # log(1536) = 7.3
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    rates = Steps(model, SMALL, "cpu", said.append)
    for progress, scale in ((0.0, 0.05), (0.2, 1.0), (0.4, 1.0), (0.7, 0.51), (1.0, 0.02), (1.1, 0.02)):
        rates.set_rates(0.02, progress)
        assert [float(r) for r in rates.rates] == pytest.approx([0.02 * scale, 0.005 * scale], rel=1e-4)
