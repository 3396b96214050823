"""What tuning takes, before it takes it: against what really is allocated, and the plans that follow."""

import gc
import weakref
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from croco.config.models import Policy
from croco.config.runtime import Runtime
from croco.config.training import Lora
from croco.errors import UserError
from croco.models.loading import load_causal, weightless
from croco.models.lora import apply_lora, trainable
from croco.models.memory import weights_bytes
from croco.models.open import POLICY
from croco.stages.train.batches import Layout, TrainingData
from croco.stages.train.encode import encode_pairs
from croco.stages.train.launch import TrainJob, tune
from croco.stages.train.memory_plan import (
    STATE_BYTES,
    Needs,
    Plan,
    agreed,
    check_weights,
    choose,
    count,
    plan,
    trained_parameters,
)
from croco.stages.train.merge import merge_adapter
from croco.stages.train.reference import weights_digest
from croco.stages.train.trainer import PairTrainer, training_arguments
from croco.storage.files import write_json
from stages.train.pairs import make_pairs, replace, write_pairs
from stages.train.test_train import SETTINGS, metrics, run, trainer_of
from tiny import make_policy, make_tokenizer, save

MIB = 2**20
NEEDS = Needs(once=100 * MIB, per_token=MIB, per_token_checkpointed=MIB / 4)


def chosen(free: int, tokens="auto", checkpointing="auto", longest: int = 50) -> Plan:
    return choose(NEEDS, free * MIB, longest, tokens, checkpointing)


def test_auto_takes_what_there_is_and_checkpoints_only_when_it_must():
    assert chosen(1000) == Plan(750, False)  # 0.85 * 1000 - 100
    assert chosen(10**6) == Plan(16384, False)
    devices = (torch.device("mps"), torch.device("cuda:1"))
    most = [choose(NEEDS, 2**50, 50, "auto", "auto", device) for device in devices]
    assert most == [Plan(16384, False), Plan(32768, False)]
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
    needs = count(bare, settings, trainer.data.examples, rows="segments")
    pairs = list(range(24))
    widest = max(batch.input_ids_BT.numel() for batch, *_ in trainer._micro_batches(pairs))
    activations = needs.of(widest, checkpointing) - needs.once
    trainer.training_step(trainer.model, {"pairs": pairs})  # gradients are there from now on
    found = allocated(lambda: trainer.training_step(trainer.model, {"pairs": pairs}))
    assert 0.6 * found < activations < 2.2 * found


def test_all_weights_in_half_precision_are_there_twice_while_a_step_lasts(tmp_path):
    """In float32, as they are tuned, and as autocast computes with them."""
    model, settings = make_policy("llama", hidden=256, layers=4).bfloat16(), replace(SETTINGS, full=True)
    examples, _ = encode_pairs(make_pairs(9), make_tokenizer(), end=2, max_tokens=200)
    needs, pairs = count(model, settings, examples, rows="segments"), list(range(9))
    trainer = PairTrainer(
        trainable(model.float(), settings, 0),
        training_arguments(
            settings, tmp_path, num_steps=1, seed=0, device=model.device, evaluate=False, bfloat16=True
        ),
        settings, TrainingData(examples, 9, [pairs], pl.DataFrame(), {}), Layout("segments", 10**6),
        torch.zeros(2, 9), pad_id=0, metrics_file=tmp_path / "metrics.jsonl",
    )  # fmt: skip
    widest = max(batch.input_ids_BT.numel() for batch, *_ in trainer._micro_batches(pairs))
    known = (STATE_BYTES + 2) * model.num_parameters()  # gradients, moments, and weights that become larger
    trainer.training_step(trainer.model, {"pairs": pairs})  # gradients are there from now on
    found = allocated(lambda: trainer.training_step(trainer.model, {"pairs": pairs}))
    assert needs.of(widest, False) - known == pytest.approx(found, rel=0.25)


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


def test_nothing_of_a_policy_is_left_when_it_has_been_tuned(tmp_path):
    model = make_policy("llama")
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if type(thing) is torch.Tensor}
    run(tmp_path, model=model)
    del model
    gc.collect()
    assert [weight() for weight in weights] == [None] * len(weights)
    left = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and id(thing) not in before]
    assert not [tensor.shape for tensor in left if tensor.grad_fn is not None]


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
        check_weights(2 * 10**15, torch.device("cpu"), "big")


def test_a_gpu_that_another_process_fills_is_one_sentence(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2**30, 80 * 2**30))
    gpu = torch.device("cuda:0")
    with pytest.raises(
        UserError, match=r"'one' has weights of 2.00 GiB, and 1.00 GiB of 80.00 GiB are free on cuda:0"
    ):
        check_weights(2 * 2**30, gpu, "one")
    with pytest.raises(
        UserError, match=r"and 0.11 GiB of 80.00 GiB are free on cuda:0, and the longest pair alone"
    ):
        choose(NEEDS, 110 * MIB, 90, "auto", "auto", gpu)


def job_of(folder: Path, **policy) -> TrainJob:
    base = save(folder / "policy", make_policy("llama", hidden=128, layers=2), make_tokenizer())
    write_pairs(folder / "pair", make_pairs(12))
    return TrainJob(
        policy=Policy(model=str(base), **policy), runtime=Runtime(), training=SETTINGS, folder=folder / "tuned",
        pairs=folder / "pair", title="train/a", seed=3,
    )  # fmt: skip


def test_memory_that_runs_out_while_tuning_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 80.00 GiB")

    monkeypatch.setattr("croco.stages.train.setup.choose_rows", full)
    said = r"train/a: memory ran out on \w+ \(CUDA out of memory.*\): expected no other process .*'auto' or fewer"
    with pytest.raises(UserError, match=said):
        tune(job_of(tmp_path), lambda *_: None)


def test_processes_of_one_policy_agree_on_a_plan():
    assert agreed([Plan(900, False), Plan(300, True)]) == Plan(300, True)


def test_whole_numbers_among_the_weights_are_left_as_they_are():
    """Weights in four bits are kept in bytes, which take no gradient."""
    model = make_policy("llama")
    model.packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    examples, _ = encode_pairs(make_pairs(6), make_tokenizer(), end=2, max_tokens=200)
    assert count(model, SETTINGS, examples, rows="plain").per_token > 0
    assert not model.packed.requires_grad


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_adapters_tuned_on_four_bits_are_merged_into_the_whole_weights(tmp_path):
    job, said = job_of(tmp_path, quantization="nf4"), []
    loaded = load_causal(job.policy, None, "auto", "nf4")[0]
    planned = weights_bytes(weightless(job.policy, "policy", "causal"), loaded.dtype.itemsize, "nf4")
    assert planned == pytest.approx(sum(weight.nbytes for weight in loaded.parameters()), rel=0.05)
    layer = loaded.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit"
    with torch.no_grad():
        loaded(torch.tensor([[3, 4, 5]], device=loaded.device))
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)  # gradients stop at it
    tune(job, lambda *_: None)
    lines = metrics(job.folder, "train")
    assert lines[0]["loss"] == pytest.approx(0.693, abs=0.02)
    assert lines[-1]["loss"] < lines[0]["loss"]
    write_json(job.folder / POLICY, job.policy.model_dump(mode="json", exclude={"trust_remote_code"}))
    merge_adapter(job.folder, tmp_path / "merged", "mit", said.append)
    assert "are those of base + adapter within" in said[0]
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
