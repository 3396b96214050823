"""Several processes tune as one does: real torchruns over gloo on this CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from croco.config import load as recipes
from croco.errors import UserError
from croco.models.lora import load_adapter
from croco.stages.train.distributed import shares
from croco.stages.train.launch import TrainJob, num_processes, tune
from stages.train.pairs import make_pairs, replace, write_pairs
from stages.train.ranks import STEPS, gradients, whole_run
from stages.train.test_train import metrics
from tiny import make_policy, make_tokenizer, save

TESTS = Path(__file__).parents[2]


def test_shares_are_even_and_whole():
    lengths = [5, 40, 12, 7, 30, 9, 22]
    dealt = shares(range(7), lengths, 2)
    assert dealt == [[1, 2, 5], [4, 6, 3, 0]]
    assert shares([3, 1], lengths, 3) == [[1], [3], []]
    assert shares([3, 1], lengths, 1) == [[3, 1]]


def assert_close(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name


def assert_same_curve(folder: Path, wanted: Path) -> None:
    for split in ("train", "validation"):
        ours, theirs = metrics(folder, split), metrics(wanted, split)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
            assert one["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=1e-3)


def torchrun(folder: Path, **environment: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(TESTS)])
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("ranks.py")), str(folder)],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def assert_gradients_of_one(folder: Path) -> None:
    for arch, budget in STEPS:
        wanted = gradients(folder / f"alone-{arch}", arch, budget)
        assert wanted["loss"] > 0
        assert not [name for name in wanted if "vision" in name]
        for number in (0, 1):
            assert_close(torch.load(folder / f"gradients-{arch}-{budget}-{number}.pt"), wanted)


def test_two_processes_have_the_gradients_and_the_curve_of_one(tmp_path):
    """The run with other free memory in each: both work by the plan of the one that has less."""
    torchrun(tmp_path)
    assert_gradients_of_one(tmp_path)
    planned = {int((tmp_path / f"tokens-{number}").read_text()) for number in (0, 1)}
    assert len(planned) == 1
    assert 100 < planned.pop() < 400
    whole_run(tmp_path / "one")
    assert_same_curve(tmp_path / "run", tmp_path / "one")


# what a file of `accelerate config` says reaches the processes in these variables, but for the first
FSDP = {
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_CPU": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@pytest.mark.slow
def test_weights_spread_by_fsdp_have_the_gradients_and_the_curve_of_one(tmp_path):
    torchrun(tmp_path, **FSDP)
    assert_gradients_of_one(tmp_path)
    for name, full in (("run", False), ("full", True)):
        whole_run(tmp_path / "one" / name, full=full)
        assert_same_curve(tmp_path / name, tmp_path / "one" / name)
    adapter, wanted = (
        load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
        for folder in (tmp_path, tmp_path / "one")
    )
    assert adapter.keys() == wanted.keys()
    assert load_adapter(make_policy("llama"), tmp_path / "run" / "adapter")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "full" / "model")


RECIPE = """
[run]
name = "toy"
languages = ["en", "da", "fr"]
[prompts]
source = "lab"
[policy]
model = "{policy}"
[training]
learning_rate = 1e-2
epochs = 2
batch_pairs = 5
max_tokens = 200
validation_fraction = 0.3
lora = {{ rank = 4, alpha = 8, dropout = 0.0 }}
[arms.mono]
[runtime]
device = "cpu"
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    policy = save(folder / "policy", make_policy("llama"), make_tokenizer())
    (folder / "toy.toml").write_text(RECIPE.format(policy=policy))
    recipe = recipes.load(folder / "toy.toml")
    write_pairs(folder / "pair", make_pairs(33))
    return TrainJob(
        policy=recipe.policy,
        runtime=recipe.runtime,
        training=recipe.arms["mono"].training,
        folder=folder / "one",
        pairs=folder / "pair",
        title="train/mono",
        seed=3,
    )


@pytest.fixture(scope="module")
def alone(job):
    return tune(job, lambda step, num_steps: None)


def over(job: TrainJob, folder: Path, **runtime) -> TrainJob:
    return replace(job, folder=folder, runtime=job.runtime.model_copy(update=runtime))


@pytest.mark.slow
def test_the_stage_starts_its_processes(job, alone, tmp_path):
    steps = []
    found = tune(over(job, tmp_path / "two", train_processes=2), lambda *now: steps.append(now))
    assert steps == [(i, alone.steps) for i in range(1, alone.steps + 1)]
    assert_same_curve(tmp_path / "two", job.folder)
    assert (found.adapter_step, found.pairs, found.tokens) == (alone.adapter_step, alone.pairs, alone.tokens)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (found.adapter, alone.adapter))
    gap = sum((ours[name] - theirs[name]).square().sum() for name in theirs).sqrt()
    assert gap < 1e-2 * sum(theirs[name].square().sum() for name in theirs).sqrt()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_two_gpus_tune_as_one_does(job, tmp_path):
    """In float32, since curves differ by more than rounding in half precision."""
    job = replace(job, policy=job.policy.model_copy(update={"dtype": "float32"}))
    one = tune(over(job, tmp_path / "one", device="cuda"), lambda *_: None)
    two = tune(over(job, tmp_path / "two", device="cuda", train_processes=2), lambda *_: None)
    assert_same_curve(tmp_path / "two", tmp_path / "one")
    assert (two.adapter_step, two.pairs, two.tokens) == (one.adapter_step, one.pairs, one.tokens)


@pytest.mark.slow
def test_bad_input_in_the_processes_is_one_sentence_here(job, tmp_path):
    broken = replace(job, training=replace(job.training, max_tokens=3))
    with pytest.raises(UserError, match="no pair to train on: of 33 pairs 33 were left out"):
        tune(over(broken, tmp_path, train_processes=2), lambda *_: None)
    with pytest.raises(UserError, match=r"accelerate_config = 'nowhere.yaml': no such file"):
        tune(over(job, tmp_path, accelerate_config="nowhere.yaml"), lambda *_: None)


def test_processes_of_a_cpu_are_counted_as_they_are_asked_for():
    assert num_processes("auto", "cpu") == 1
    assert num_processes(3, "cpu") == 3


def test_a_gpu_that_is_named_is_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [num_processes("auto", device) for device in ("cuda", "cuda:1")] == [4, 1]
    with pytest.raises(
        UserError, match=r"train_processes = 2, expected at most one per GPU, and there are 1"
    ):
        num_processes(2, "cuda:1")


ASKED = """
import sys
from pathlib import Path
from croco.stages.train.launch import TrainJob, tune
job = TrainJob.model_validate_json(Path(sys.argv[1]).read_text())
tune(job, lambda step, num_steps: print(step, flush=True))
"""


@pytest.mark.slow
def test_killed_with_its_processes_it_goes_on_to_the_same_curve(job, alone, tmp_path):
    """SIGKILL to the process that started them: they end too, and the next start ends where one process does."""
    again = over(job, tmp_path / "killed", train_processes=2, checkpoint_minutes=1e-6)
    (tmp_path / "job.json").write_text(again.model_dump_json())
    process = subprocess.Popen(
        [sys.executable, "-c", ASKED, str(tmp_path / "job.json")], stdout=subprocess.PIPE
    )
    assert process.stdout
    for line in process.stdout:
        if int(line) >= 3:
            break
    others = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(others) >= 3  # torchrun and two processes
    deadline = time.monotonic() + 60
    while any(other.is_running() and other.status() != psutil.STATUS_ZOMBIE for other in others):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    steps = []
    tune(again, lambda step, num_steps: steps.append(step))
    assert steps[0] > 1
    assert_same_curve(tmp_path / "killed", job.folder)
