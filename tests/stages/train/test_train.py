"""Whole tuning runs on a tiny policy: what comes out, what stops it, and that a kill leaves no trace."""

import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel

import zoo
from croco.config.load import load
from croco.config.runtime import Runtime
from croco.config.training import Lora, Training
from croco.errors import UserError
from croco.models import output_layer
from croco.models.loading import load_policy
from croco.models.lora import apply_lora, load_adapter
from croco.pipeline.fingerprint import train_settings
from croco.pipeline.node import settings_values
from croco.pipeline.stage import Work
from croco.stages.train.batches import Layout, TrainingData, collate
from croco.stages.train.encode import encode_pairs
from croco.stages.train.forward import completion_logps, token_counts
from croco.stages.train.reference import reference_logps
from croco.stages.train.setup import check_pairs, encode
from croco.stages.train.stage import train
from croco.stages.train.train import train_pairs
from croco.stages.train.trainer import PairTrainer, training_arguments
from croco.storage.files import write_json
from croco.storage.schemas import TABLES, ledger
from croco.storage.shards import merge_ledgers, write_shard
from models.attention.varlen_twin import varlen_twin
from pipeline.test_full_disk import files_no_larger_than
from stages.train.pairs import make_pairs, replace, write_pairs
from tiny import make_policy, make_tokenizer, save

TOKENIZER = make_tokenizer()
SETTINGS = Training(
    learning_rate=1e-2,
    epochs=2,
    batch_pairs=6,
    max_tokens=200,
    validation_fraction=0.3,
    lora=Lora(rank=4, alpha=8, dropout=0.1),
)


def run(
    folder: Path, settings: Training = SETTINGS, num_pairs: int = 36, on_step=None, model=None, **options
):
    machine = {name: options.pop(name) for name in [*options] if name in Runtime.model_fields}
    return train_pairs(
        model or make_policy("llama"),
        TOKENIZER,
        make_pairs(num_pairs),
        settings=settings,
        folder=folder,
        seed=7,
        runtime=Runtime(**{"micro_batch_tokens": 8192, **machine}),
        on_step=on_step,
        **options,
    )


def metrics(folder: Path, split: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(folder)


def test_a_reference_on_line_gives_the_same_run_without_a_table(tmp_path):
    settings = replace(SETTINGS, lora=replace(SETTINGS.lora, dropout=0.0))
    run(tmp_path / "table", settings)
    run(tmp_path / "line", settings, reference_table=False)
    assert not (tmp_path / "line" / "scratch" / "reference").exists()
    kept, computed = (metrics(tmp_path / name, "train") for name in ("table", "line"))
    for one, other in zip(kept, computed, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert computed[-1]["loss"] < computed[0]["loss"] - 0.1
    validation = [metrics(tmp_path / name, "validation")[-1]["loss"] for name in ("table", "line")]
    assert validation[1] == pytest.approx(validation[0], rel=1e-4)


def test_a_reference_on_line_is_refused_where_no_adapter_can_be_switched_off(tmp_path):
    with pytest.raises(UserError, match="reference_table = false"):
        run(tmp_path, replace(SETTINGS, full=True), reference_table=False)


def test_a_run_learns_its_pairs_and_says_what_it_did(undisturbed):
    folder, result = undisturbed
    train, validation = metrics(folder, "train"), metrics(folder, "validation")
    assert [line["step"] for line in train] == list(range(1, result.steps + 1))
    assert train[0]["loss"] == pytest.approx(0.693, abs=0.01)
    assert abs(train[0]["rewards/margins"]) < 1e-3
    assert train[-1]["loss"] < 0.5
    assert train[-1]["rewards/accuracies"] > 0.8
    assert validation[-1]["step"] == result.steps
    assert [line["step"] for line in validation] == [0, 2, 4, 6, 8]
    assert result.metrics["validation"]["loss"] == validation[-1]["loss"]
    assert result.pairs + result.validation_pairs == 36
    assert result.validation_pairs > 0
    assert result.plain_rows is None


def test_the_adapter_loads_and_moves_the_policy_as_trained(undisturbed):
    folder, _ = undisturbed
    examples, _ = encode_pairs(make_pairs(36), TOKENIZER, end=2, max_tokens=200)
    base, tuned = make_policy("llama"), load_adapter(make_policy("llama"), folder / "adapter")
    logps = [
        reference_logps(model, examples, folder=folder / name, rows="segments", micro_batch_tokens=512)
        for name, model in (("base", base), ("tuned", tuned))
    ]
    gain = 0.1 * (logps[1] - logps[0])
    assert (gain[0] > gain[1]).float().mean() > 0.7


def test_sft_raises_the_likelihood_of_the_chosen(tmp_path):
    result = run(tmp_path, replace(SETTINGS, method="sft"))
    train = metrics(tmp_path, "train")
    assert train[-1]["loss"] < train[0]["loss"] - 0.3
    assert set(result.metrics["train"]) == {
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "logps/chosen",
        "nll",
        "pairs",
    }


def test_all_weights_of_a_half_precision_model_move_by_steps_it_could_not_hold(tmp_path, monkeypatch):
    """A step of 1e-6 is below what bfloat16 tells apart: weights are kept in float32, and compute in bfloat16."""
    model, logits, own = make_policy("llama").to(torch.bfloat16), [], output_layer._logits
    monkeypatch.setattr(output_layer, "_logits", lambda *args: logits.append(own(*args)) or logits[-1])
    settings = replace(SETTINGS, full=True, learning_rate=1e-6, epochs=1)
    result = run(tmp_path, settings, model=model, num_pairs=12)
    assert {each.dtype for each in logits} == {torch.bfloat16}
    assert result.adapter == tmp_path / "model"
    found, base = load_file(result.adapter / "model.safetensors"), make_policy("llama").to(torch.bfloat16)
    moved = {name: (found[name] - p.float()).abs().max().item() for name, p in base.named_parameters()}
    assert all(0 < most < 1e-5 for name, most in moved.items() if "proj" in name)
    reloaded, tokenizer = load_policy(str(result.adapter))
    assert tokenizer.chat_template
    assert reloaded.generation_config.eos_token_id == 2


def test_float16_is_refused_for_all_weights_and_for_mixed_precision(tmp_path, monkeypatch):
    """Its gradients overflow where its loss scale is tried out, which the sentinel cannot tell from a broken run."""
    with pytest.raises(UserError, match=r"training\.full .* float16: expected policy\.dtype = 'bfloat16'"):
        run(tmp_path, replace(SETTINGS, full=True), model=make_policy("llama").to(torch.float16))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # as the file of `accelerate config` says it
    with pytest.raises(UserError, match=r"accelerate_config has mixed_precision = fp16, expected bf16 or no"):
        run(tmp_path)


def test_simpo_needs_no_reference_and_is_watched_without_one(tmp_path):
    result = run(tmp_path, replace(SETTINGS, loss="simpo", beta=2.0))
    train = metrics(tmp_path, "train")
    assert result.stopped is None
    assert train[-1]["loss"] < train[0]["loss"]
    assert train[0]["nll"] > 2
    assert "kl" not in train[0]
    assert not (tmp_path / "scratch" / "reference").exists()


def test_denormal_numbers_are_zero_while_it_trains_and_not_after(tmp_path: Path) -> None:
    tiny = torch.full((2,), 1e-30)
    seen: list[bool] = []
    run(tmp_path, on_step=lambda step, num_steps: seen.append(bool((tiny * 1e-10).any())))
    assert set(seen) == {False}
    assert (tiny * 1e-10).any()


def assert_same_run(folder: Path, expected: Path) -> None:
    """Equal to the last bit: the curves and the adapter."""
    assert metrics(folder, "train") == metrics(expected, "train")
    assert metrics(folder, "validation") == metrics(expected, "validation")
    found, wanted = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, expected))
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)


def test_a_run_that_breaks_between_checkpoints_goes_on(undisturbed, tmp_path):
    def crash(step, num_steps):
        if step == 8:
            raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="the power went"):
        run(tmp_path, on_step=crash)
    steps = []
    run(tmp_path, on_step=lambda step, num_steps: steps.append(step))
    assert steps[0] == 7  # a checkpoint every second step: 2, 4, 6
    assert_same_run(tmp_path, undisturbed[0])


def test_a_run_that_broke_after_its_last_step_only_writes_the_adapter(undisturbed, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("croco.stages.train.train.adopt", broken)
        with pytest.raises(OSError, match="disk"):
            run(tmp_path)
    steps = []
    result = run(tmp_path, on_step=lambda step, num_steps: steps.append(step))
    assert steps == []
    assert result.metrics == undisturbed[1].metrics
    assert_same_run(tmp_path, undisturbed[0])


KILLED = """
import os, signal, sys
from pathlib import Path
import croco.stages.train.checkpoints as checkpoints
from stages.train.test_train import run

sealed = checkpoints.write_json
def kill_before_the_second_seal(path, value):
    if path.name == checkpoints.SEAL and path.parent.name != "checkpoint-2":
        os.kill(os.getpid(), signal.SIGKILL)
    sealed(path, value)
checkpoints.write_json = kill_before_the_second_seal
run(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("keep", [0, 0.5, 0.95])
def test_a_metrics_file_that_lost_lines_takes_its_checkpoints_along(undisturbed, tmp_path, keep):
    """The best checkpoint is chosen by these lines: without them training goes back to where they end."""

    def crash(step, num_steps):
        if step == 8:
            raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="the power went"):
        run(tmp_path, on_step=crash)
    lines = tmp_path / "metrics.jsonl"
    content = lines.read_bytes()
    lines.write_bytes(content[: int(keep * len(content))] + b"\n3\n")
    run(tmp_path)
    assert_same_run(tmp_path, undisturbed[0])


@pytest.mark.slow
def test_sigkill_inside_a_checkpoint_leaves_no_trace(undisturbed, tmp_path):
    source, tests = Path(__file__).parents[3] / "src", Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{tests}"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (
        tmp_path / "scratch" / "checkpoints" / "checkpoint-4"
    ).is_dir()  # whole to the eye, but not sealed
    assert not (tmp_path / "adapter").exists()
    steps = []
    run(tmp_path, on_step=lambda step, num_steps: steps.append(step))
    assert steps[0] == 3
    assert_same_run(tmp_path, undisturbed[0])


ASKED = """
import sys
from pathlib import Path
from stages.train.test_train import run
run(Path(sys.argv[1]), checkpoint_minutes=1e-6)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_sigkill_at_any_step_leaves_no_trace(undisturbed, tmp_path, seed):
    """Twice in one run, at random moments; with dropout, evaluations and a best checkpoint. Equal to the last bit."""
    draw = random.Random(seed)
    source, tests = Path(__file__).parents[3] / "src", Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{tests}"}
    lines = tmp_path / "metrics.jsonl"
    for at in sorted(draw.sample(range(2, 11), 2)):  # of the 13 lines of a whole run
        process = subprocess.Popen(
            [sys.executable, "-c", ASKED, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (lines.is_file() and lines.read_text().count("\n") >= at):
            time.sleep(0.01)
        time.sleep(draw.random() / 10)
        process.kill()
        process.wait()
    run(tmp_path)
    assert_same_run(tmp_path, undisturbed[0])
    assert sum(line["step"] == 0 for line in metrics(tmp_path, "validation")) == 1


def stopped_before(step, folder):
    """A run that broke at a step, with a checkpoint at every second one."""

    def crash(at, num_steps):
        if at == step:
            raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="the power went"):
        run(folder, on_step=crash)
    return folder / "scratch" / "checkpoints"


@pytest.mark.parametrize("lost", ["optimizer.pt", "adapter_model.safetensors", "rng_state.pth", "a byte"])
def test_a_checkpoint_that_lost_a_file_is_none(undisturbed, tmp_path, lost):
    """A kill while it is removed, or a person: the run goes on from the one before, as if nothing had been."""
    last = stopped_before(8, tmp_path) / "checkpoint-6"
    if lost == "a byte":
        (last / "optimizer.pt").write_bytes((last / "optimizer.pt").read_bytes()[:-1])
    else:
        (last / lost).unlink()
    steps = []
    run(tmp_path, on_step=lambda step, num_steps: steps.append(step))
    assert steps[0] == 5
    assert_same_run(tmp_path, undisturbed[0])


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_a_checkpoint_that_holds_code_is_not_run(tmp_path, name):
    path = stopped_before(4, tmp_path) / "checkpoint-2" / name
    size = path.stat().st_size
    path.write_bytes(pickle.dumps(Harmful(tmp_path / "made")).ljust(size, b"\0"))
    with pytest.raises(UserError, match=r"checkpoint-2 cannot be read .*, expected a checkpoint as training"):
        run(tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_disk_that_is_full_is_one_sentence_and_the_run_goes_on(undisturbed, tmp_path):
    with files_no_larger_than(10_000), pytest.raises(UserError, match=r"cannot be written .*make room"):
        run(tmp_path)
    run(tmp_path)
    assert_same_run(tmp_path, undisturbed[0])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "falcon", "phimoe"])
def test_the_models_own_noise_is_off(tmp_path, arch):
    """In layers (GPT-2), in numbers that modules keep (Llama), in what is read from the config (Falcon), and routers
    that draw experts while they train (PhiMoE)."""
    torch.manual_seed(0)
    if arch == "phimoe":
        model, target = zoo.make("PhiMoE"), "q_proj"
        model.config.router_aux_loss_coef = 0.0
    elif arch == "llama":
        model = make_policy("llama")
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        target = "q_proj"
    elif arch == "gpt2":
        rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.15}
        model, target = GPT2LMHeadModel(GPT2Config(vocab_size=320, **shape, **rates)), None
    else:
        shape = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "initializer_range": 0.15,
        }
        rates = {"hidden_dropout": 0.5, "attention_dropout": 0.5}
        model, target = FalconForCausalLM(FalconConfig(vocab_size=320, **shape, **rates)), "query_key_value"
    lora = Lora(rank=4, dropout=0.0, targets=(target,)) if target else Lora()
    settings = replace(SETTINGS, lora=lora, learning_rate=1e-9, full=target is None, epochs=1)
    result = run(tmp_path, settings, model=model, num_pairs=12)
    for line in metrics(tmp_path, "train"):
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert abs(line["rewards/margins"]) < 1e-4
    if arch == "gpt2":  # what is saved keeps the rates that the model came with
        assert json.loads((result.adapter / "config.json").read_text())["resid_pdrop"] == 0.5


def test_the_context_of_stretched_positions_is_theirs():
    model = make_policy("llama", max_positions=50)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    assert encode(model, TOKENIZER, make_pairs(36), SETTINGS, {}, 0).dropped.is_empty()


def test_a_pair_longer_than_the_policys_context_is_left_out(tmp_path):
    result = run(tmp_path, model=make_policy("llama", max_positions=50), num_pairs=36)
    assert len(result.dropped)
    assert result.dropped["reason"].str.contains("more than the policy's context of 50").all()
    assert result.pairs + result.validation_pairs + len(result.dropped) == 36


def test_a_tracker_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"names 'tensorbord', expected some of .*, tensorboard, "):
        run(tmp_path, trackers=("tensorbord",))
    with pytest.raises(UserError, match="names 'clearml', which is not installed here"):
        run(tmp_path, trackers=("clearml",))


def test_an_adapter_of_another_base_is_no_start(undisturbed, tmp_path):
    """A base of the same shape takes it without a word; what its folder says of its base does not."""
    bases = [save(tmp_path / str(seed), make_policy("llama", seed=seed), TOKENIZER) for seed in (0, 1)]
    run(tmp_path / "one", model=load_policy(str(bases[0]))[0], num_pairs=12)
    with pytest.raises(UserError, match=r"was trained on .*0, expected one of '.*1'"):
        run(tmp_path / "two", model=load_policy(str(bases[1]))[0], start=tmp_path / "one" / "adapter")


def test_checkpoints_of_other_settings_are_not_taken_up(tmp_path):
    run(tmp_path, num_pairs=12)
    steps = []
    run(
        tmp_path,
        replace(SETTINGS, beta=0.2),
        num_pairs=12,
        on_step=lambda step, num_steps: steps.append(step),
    )
    assert steps[0] == 1


def trainer_of(tmp_path, budget, rows="segments", checkpointing=False, num_pairs=9, arch="llama", **shape):
    torch.manual_seed(0)
    model = make_policy(arch, **shape)
    examples, _ = encode_pairs(make_pairs(num_pairs), TOKENIZER, end=2, max_tokens=200)
    reference = reference_logps(
        make_policy(arch, seed=1, **shape),
        examples,
        folder=tmp_path,
        rows="segments",
        micro_batch_tokens=512,
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = replace(SETTINGS, lora=Lora(dropout=0.0))
    return PairTrainer(
        apply_lora(model, settings.lora, 0),
        training_arguments(settings, tmp_path, num_steps=1, seed=0, device=model.device, evaluate=False),
        settings,
        TrainingData(examples, num_pairs, [range(num_pairs)], pl.DataFrame(), {}),
        Layout(rows, budget),
        reference,
        pad_id=0,
        metrics_file=tmp_path / "metrics.jsonl",
    )


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 1},
        {"budget": 150},
        {"rows": "plain"},
        {"rows": "single"},
        {"rows": "packed"},
        {"checkpointing": True},
        {"checkpointing": True, "rows": "packed"},
    ],
)
def test_the_gradient_depends_on_the_pairs_not_on_their_layout(tmp_path, monkeypatch, options):
    monkeypatch.setattr("croco.models.attention.rows.varlen_attn", varlen_twin)
    found = []
    for name, each in (("whole", {"budget": 10**6}), ("other", {"budget": 10**6, **options})):
        trainer = trainer_of(tmp_path / name, **each)
        loss = trainer.training_step(trainer.model, {"pairs": list(range(9))})
        gradients = {
            n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" in n
        }
        found.append((loss, gradients))
    (loss, gradients), (other_loss, other_gradients) = found
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert gradient.norm() > 0
        assert (other_gradients[name] - gradient).norm() / gradient.norm() < 1e-4


@pytest.mark.parametrize("rows", ["plain", "single", "masked", "packed"])
def test_a_micro_batch_keeps_to_its_budget_in_every_layout(tmp_path, rows):
    """Plain rows repeat the prompt, and are as wide as the longest of them."""
    trainer = trainer_of(tmp_path, budget=300, rows=rows, num_pairs=24)
    batches = [batch for batch, *_ in trainer._micro_batches(range(24))]
    assert 1 < len(batches) < 24
    for batch in batches:
        tokens = sum(one.input_ids_BT.numel() for one in batch.singles or (batch,))
        assert tokens <= 300 or batch.num_pairs == 1


def test_reference_values_are_computed_once_per_base(tmp_path):
    examples, _ = encode_pairs(make_pairs(6), TOKENIZER, end=2, max_tokens=200)
    done = []

    def values(seed, part):
        return reference_logps(
            make_policy("llama", seed=seed),
            part,
            folder=tmp_path,
            rows="segments",
            micro_batch_tokens=300,
            on_examples=done.append,
        )

    first = values(0, examples[:4])
    again = values(0, examples)
    assert again[:, :4].equal(first)
    assert done == [4, 2]
    assert not values(1, examples).allclose(again)
    assert done == [4, 2, 6]


@pytest.mark.parametrize("sft_on", ["assistant", "conversation"])
def test_learning_more_than_the_completion_is_the_models_own_loss(sft_on):
    """Against transformers' loss with labels of our own making, in every layout of rows."""
    turns = [("user", "Which month?"), ("assistant", "March."), ("user", "And after it?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    said = [{**messages[0], "content": "Hi"}]
    rows = [
        {"prompt_id": "a", "language": "en", "messages": messages, "chosen": "April comes after March."},
        {"prompt_id": "b", "language": "en", "messages": said, "chosen": "maj"},
    ]
    model, end = make_policy("llama"), TOKENIZER.eos_token_id
    examples, _ = encode_pairs(
        pl.DataFrame(rows), TOKENIZER, end=end, max_tokens=200, chosen_only=True, sft_on=sft_on
    )
    totals = []
    for row, example in zip(rows, examples, strict=True):
        whole = [*row["messages"], {"role": "assistant", "content": row["chosen"]}]
        ids = TOKENIZER.apply_chat_template(whole, tokenize=True, return_dict=False)
        labels, inside, user = list(ids), False, TOKENIZER.convert_tokens_to_ids("<|assistant|>")
        for place, token in enumerate(ids):
            if sft_on == "assistant" and not inside:
                labels[place] = -100
            inside = token == user or (inside and token != end)
        count = sum(label >= 0 for label in labels[1:])
        assert example.num_learnt == count
        loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        totals.append(-loss * count)
    for layout in ("segments", "masked", "plain", "single"):
        batch = collate(examples, rows=layout)
        torch.testing.assert_close(
            completion_logps(model, batch)[0], torch.tensor(totals), rtol=1e-4, atol=1e-3
        )
        assert token_counts(batch)[0].tolist() == [example.num_learnt for example in examples]


def test_a_policy_on_the_second_gpu_is_trained_there(tmp_path, monkeypatch):
    """transformers moves a model to the first GPU by itself."""
    current = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    second = torch.device("cuda:1")
    made = training_arguments(Training(), tmp_path, num_steps=1, seed=0, device=second, evaluate=False)
    assert (made.device, current[-1], made.n_gpu) == (second, second, 1)


def test_warm_up_is_rounded_as_asked(tmp_path):
    def warm_up(**settings):
        own = Training(warmup_ratio=0.05, **settings)
        return training_arguments(
            own, tmp_path, num_steps=30, seed=0, device=torch.device("cpu"), evaluate=False
        ).warmup_steps

    assert (warm_up(), warm_up(warmup_rounding="up")) == (1, 2)
    assert not {"sft_on", "warmup_rounding"} & Training().model_dump().keys()  # in no fingerprint by default
    assert Training.model_validate(Training(warmup_rounding="up").model_dump()).warmup_rounding == "up"


def test_the_reference_is_computed_for_the_pairs_that_are_used_only(tmp_path, capsys):
    settings = replace(SETTINGS, updates=2, batch_pairs=4, validation_fraction=0.0)
    run(tmp_path / "few", settings)
    known = pl.read_parquet(sorted((tmp_path / "few" / "scratch" / "reference").rglob("*.parquet")))
    assert 0 < known.height <= 2 * 4 * 2  # two steps of four pairs of two completions
    run(tmp_path / "all", replace(settings, updates=None, epochs=1))
    every = pl.read_parquet(sorted((tmp_path / "all" / "scratch" / "reference").rglob("*.parquet")))
    assert every.height > known.height
    assert "to train on" not in capsys.readouterr().err


def test_little_to_learn_from_is_said_before_training(tmp_path, capsys):
    run(tmp_path / "few", replace(SETTINGS, batch_pairs=64, epochs=1, validation_fraction=0.0))
    said = capsys.readouterr().err
    assert "36 pairs to train on, training.batch_pairs = 64: 1 optimizer step in all" in said


def test_no_pair_at_all_names_the_main_reasons_and_the_setting(tmp_path):
    dropped = [("completion", f"p{i}", "en", i, "cut at the token limit") for i in range(7)]
    dropped += [
        ("completion", "p8", "da", 0, "wrong language"),
        ("pool", "p0", "en", None, "no candidate left in the pool"),
    ]
    read = {"completion": 8, "pool": 1}
    schema = TABLES["pairs"].schema
    write_shard(
        tmp_path,
        0,
        schema.empty_table(),
        schema,
        read=read,
        written={"completion": 0, "pool": 0},
        dropped=ledger(dropped),
    )
    merge_ledgers(tmp_path)
    with pytest.raises(
        UserError,
        match=r"no pair to train on \(7 of 8 completions: cut at the token limit; 1 of 8 completions: wrong language; "
        r"1 of 1 pools: no candidate left in the pool\): expected another sampling.max_new_tokens, or guards.cut",
    ):
        check_pairs(tmp_path)


def test_no_pair_left_is_one_sentence(tmp_path):
    with pytest.raises(
        UserError,
        match=r"no pair to train on: of 5 pairs 5 were left out \(the first, p0 in en, because prompt",
    ):
        train_pairs(
            make_policy("llama"),
            TOKENIZER,
            make_pairs(5),
            settings=replace(SETTINGS, max_tokens=3),
            folder=tmp_path,
            seed=0,
        )


def test_broken_weights_stop_before_the_first_step(tmp_path):
    model = make_policy("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not a finite number"):
        run(tmp_path, model=model)


def test_a_loss_that_is_no_number_stops_and_says_the_step(tmp_path):
    with pytest.raises(
        UserError, match=r"training stopped at step \d+ of 8: the .* is .*, expected a finite number"
    ):
        run(tmp_path, replace(SETTINGS, learning_rate=1e30, max_grad_norm=1e30))


def test_an_adapter_that_changes_nothing_is_an_error(tmp_path):
    with pytest.raises(UserError, match="changed nothing"):
        run(tmp_path, replace(SETTINGS, learning_rate=0.0), num_pairs=12)


def test_a_layer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="names c_attn, which LlamaForCausalLM does not have"):
        run(tmp_path, replace(SETTINGS, lora=Lora(targets=("q_proj", "c_attn"))))


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapter(make_policy("llama"), tmp_path)


RECIPE = """
[run]
name = "toy"
languages = ["en", "da", "fr"]
seed = 7
[prompts]
source = "lab"
[evaluation]
source = "lab"
[policy]
model = "{policy}"
instruction = {{ da = "Svar på dansk." }}
[training]
learning_rate = 1e-2
batch_pairs = 6
max_tokens = 40
[arms.mono]
"""


def test_the_stage_accounts_for_every_pair(tmp_path):
    policy = save(tmp_path / "policy", make_policy("llama"), TOKENIZER)
    (tmp_path / "toy.toml").write_text(RECIPE.format(policy=policy))
    recipe, run_folder = load(tmp_path / "toy.toml"), tmp_path / "run"
    write_json(run_folder / "recipe.json", recipe.model_dump(mode="json"))
    write_pairs(tmp_path / "pair", make_pairs(12))
    work = Work(
        arm="mono",
        folder=run_folder / "train" / "mono",
        settings=settings_values(train_settings(recipe, "mono")),
        runtime=recipe.runtime,
        inputs={"pair": tmp_path / "pair"},
        table=None,
        title="train/mono",
    )
    train(work)
    counts, facts = work.record_file["counts"], work.record_file["facts"]
    assert counts["read"] == {"pair": 12}
    assert counts["written"]["pair"] + counts["dropped"]["pair"] == 12
    assert counts["dropped"]["pair"] > 0
    assert facts["pairs"] == counts["written"]["pair"]
    assert facts["plain_rows"] is None
    assert (work.folder / "adapter" / "adapter_model.safetensors").is_file()
    reasons = pl.read_parquet(work.folder / "dropped.parquet")["reason"]
    assert reasons.str.contains("max_tokens 40").all()


def test_an_adapter_of_another_size_is_refused(undisturbed):
    folder, _ = undisturbed
    with pytest.raises(UserError, match="does not fit this LlamaForCausalLM"):
        load_adapter(make_policy("llama", hidden=64), folder / "adapter")


def test_tuning_goes_on_from_an_adapter(undisturbed, tmp_path):
    """Against the base the first step has the margins where the other arm ended; against the start it has none."""
    start = undisturbed[0] / "adapter"
    first, settings = {}, replace(SETTINGS, lora=replace(SETTINGS.lora, dropout=0.0))
    for reference in ("base", "start"):
        result = run(tmp_path / reference, settings, start=start, reference=reference)
        first[reference] = metrics(tmp_path / reference, "train")[0]
        before, after = (load_file(path / "adapter_model.safetensors") for path in (start, result.adapter))
        assert before.keys() == after.keys()
        assert not all(before[name].equal(after[name]) for name in before)
    assert abs(first["start"]["rewards/margins"]) < 1e-3 < 0.1 < first["base"]["rewards/margins"]
    assert first["start"]["loss"] == pytest.approx(0.693, abs=0.01)
    assert first["base"]["loss"] < first["start"]["loss"]


def test_a_start_that_is_another_adapter_than_the_settings_say_is_refused(undisturbed, tmp_path):
    start = undisturbed[0] / "adapter"
    with pytest.raises(UserError, match=r"has rank 4, expected training.lora.rank = 8"):
        run(tmp_path, replace(SETTINGS, lora=replace(SETTINGS.lora, rank=8)), start=start)
    with pytest.raises(UserError, match="no such folder, expected an adapter to start from"):
        run(tmp_path, start=tmp_path / "nowhere")
    with pytest.raises(UserError, match="of which the model has a place for"):
        run(tmp_path, start=start, model=make_policy("llama", layers=1))
