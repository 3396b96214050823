"""What tuning takes, before it takes it: against what really is allocated, and the plans that follow."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from croco.cli.preflight import examine
from croco.config import load as recipes
from croco.config.training import Lora
from croco.errors import UserError
from croco.models.lora import apply_lora
from croco.stages.train.encode import encode_pairs
from croco.stages.train.memory_plan import Needs, Plan, check_weights, choose, count, plan, trained_parameters
from croco.stages.train.reference import weights_digest
from stages.train.pairs import make_pairs, replace
from stages.train.test_train import SETTINGS, run, trainer_of
from tiny import make_policy, make_tokenizer

MIB = 2**20
NEEDS = Needs(once=100 * MIB, per_token=MIB, per_token_checkpointed=MIB / 4)


def chosen(free: int, tokens="auto", checkpointing="auto", longest: int = 50) -> Plan:
    return choose(NEEDS, free * MIB, longest, tokens, checkpointing)


def test_auto_takes_what_there_is_and_checkpoints_only_when_it_must():
    assert chosen(1000) == Plan(750, False)  # 0.85 * 1000 - 100
    assert chosen(10**6) == Plan(16384, False)
    most = {device: choose(NEEDS, 2**50, 50, "auto", "auto", device) for device in ("mps", "cuda:1")}
    assert most == {"mps": Plan(16384, False), "cuda:1": Plan(32768, False)}
    assert chosen(160) == Plan(144, True)  # (0.85 * 160 - 100) * 4: the longest of 50 does not fit without
    assert chosen(1000, tokens=700) == Plan(700, False)
    assert chosen(1000, tokens=2000) == Plan(2000, True)
    assert chosen(1000, checkpointing=True) == Plan(3000, True)
    assert chosen(1000, tokens=880, checkpointing=False) == Plan(880, False)  # asked for, so without a margin


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"free": 300, "tokens": 400, "checkpointing": False},
         r"about 0.49 GiB beside the weights for micro-batches of 400 tokens without gradient checkpointing, and 0.29 "
         r"GiB are free on cpu: expected runtime.micro_batch_tokens of at most 155"),
        ({"free": 160, "tokens": 40, "checkpointing": False, "longest": 90}, "expected runtime.gradient_checkpointing"),
        ({"free": 110, "longest": 90}, "the longest pair alone takes 90: expected a smaller training.max_tokens"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(options, said):
    with pytest.raises(UserError, match=said):
        chosen(**options)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("budget", [1, 10**6])
def test_the_count_is_what_a_step_allocates(tmp_path, checkpointing, budget):
    """The peak of torch's own allocations over a step, of a model whose activations are large beside the rest."""
    torch.manual_seed(0)
    trainer = trainer_of(tmp_path, budget, checkpointing=checkpointing, hidden=128, layers=4, num_pairs=24)
    bare = make_policy("llama", hidden=128, layers=4)
    settings = replace(SETTINGS, lora=Lora(dropout=0.0))
    needs = count(bare, settings, trainer.examples, rows="segments")
    pairs = list(range(24))
    widest = max(batch.input_ids_BT.numel() for batch, *_ in trainer._micro_batches(pairs))
    activations = needs.of(widest, checkpointing) - needs.once
    trainer.training_step(trainer.model, {"pairs": pairs})  # gradients are there from now on
    found = allocated(lambda: trainer.training_step(trainer.model, {"pairs": pairs}))
    assert 0.6 * found < activations < 2.2 * found


def allocated(work) -> int:
    """The most that was allocated at once while it worked."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as seen:
        work()
    now = most = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_counting_leaves_the_model_as_it_was():
    model = make_policy("llama")
    examples, _ = encode_pairs(make_pairs(6), make_tokenizer(), end=2, max_tokens=200)
    before, names = weights_digest(model), [name for name, _ in model.named_parameters()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for settings in (SETTINGS, replace(SETTINGS, full=True)):
        assert count(model, settings, examples, rows="plain").per_token > 0
    assert torch.get_rng_state().equal(state)
    assert weights_digest(model) == before
    assert [name for name, _ in model.named_parameters()] == names
    assert not model.training
    found = plan(model, SETTINGS, examples, "auto", "auto", rows="segments")
    assert found == Plan(16384, False)


def test_trained_numbers_are_those_that_lora_makes():
    model, settings = make_policy("llama"), SETTINGS.lora
    expected = trained_parameters(model, SETTINGS)
    adapted = apply_lora(model, settings, 0)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == expected


def test_a_run_that_cannot_fit_ends_before_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("croco.stages.train.memory_plan.free_bytes", lambda device: 2**16)
    with pytest.raises(UserError, match=r"tuning needs about .* GiB beside the weights"):
        run(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_weights_larger_than_memory_are_named_before_they_are_loaded():
    with pytest.raises(
        UserError, match=r"'big' has weights of 1862645.15 GiB, and .* free on cpu: expected a smaller"
    ):
        check_weights(10**15, 2, torch.device("cpu"), "big")


def test_doctor_says_what_tuning_takes(tiny_models):
    values = {
        "run": {"name": "x", "languages": ["en", "da"]},
        "prompts": {"source": str(tiny_models.prompts)},
        "evaluation": {"source": str(tiny_models.test_prompts)},
        "policy": {"model": str(tiny_models.policy)},
        "reward": {"model": str(tiny_models.reward)},
        "arms": {"lora": {}, "whole": {"training": {"full": True}}},
    }
    said = [line for line in examine(recipes.from_dict(values)) if line.startswith("tuning")]
    assert said[0].startswith("tuning        adapters of rank 16: 0.0 M trained")
    assert said[1].startswith("tuning        all weights: 0.0 M trained")
    assert all(line.endswith("fits") for line in said)
