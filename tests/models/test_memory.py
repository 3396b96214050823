"""Memory that really runs out: the process may not map more, torch's own allocator fails, and nothing is lost."""

import subprocess
import sys
from pathlib import Path

import pytest

from tiny import make_policy, make_tokenizer, save

SCRIPT = """
import logging, resource, sys
from croco.models.protocols import Decoding, Request, ScoreRequest
from croco.models.transformers import HFSampler, HFScorer
from croco.models import prefix_forward
from tiny import make_policy, make_reward, make_tokenizer

logging.basicConfig(format="%(message)s", stream=sys.stdout)
tokenizer, prompt = make_tokenizer(), list(range(5, 45))
if sys.argv[1] == "sample":
    engine = HFSampler(make_policy("llama", vocab_size=20_000), tokenizer, 300)
    asked = [Request(k, prompt[k:], [100 * k + i for i in range(64)]) for k in range(8)]
    run = lambda: dict(engine.sample(asked, Decoding(1.0, 1.0, 0, 6)))
else:
    engine = HFScorer(make_reward("qwen3", hidden=64, layers=2), tokenizer, 3000)
    prefix_forward.CPU_TOKENS = 10**9
    asked = [ScoreRequest(k, prompt[k:], [[200 + i, *range(50, 150)] for i in range(64)]) for k in range(12)]
    run = lambda: [[round(x, 4) for x in row] for row in engine.score(asked)]
slowly = run()
engine.token_budget = 500_000
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + int(sys.argv[2]) * 2**20,) * 2)
print(run() == slowly, engine.token_budget)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts what is mapped as Linux does")
@pytest.mark.parametrize("what", ["sample", "score"])
def test_a_failed_allocation_halves_the_budget_and_loses_nothing(what: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, what, "64"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert found.returncode == 0, found.stdout + found.stderr
    *warnings, last = found.stdout.splitlines()
    equal, budget = last.split()
    assert equal == "True"
    assert 1000 < int(budget) < 500_000
    assert len(warnings) >= 1
    assert all("out of memory, going on with a budget of" in line for line in warnings)


LOAD = """
import resource, sys
from croco.models.loading import load_policy
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**25,) * 2)
load_policy(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts what is mapped as Linux does")
def test_weights_that_do_not_fit_are_one_sentence(tmp_path: Path) -> None:
    large = save(tmp_path / "large", make_policy("llama", vocab_size=500_000), make_tokenizer())
    words = [sys.executable, "-c", "import transformers.models.llama.modeling_llama\n" + LOAD, str(large)]
    found = subprocess.run(words, capture_output=True, text=True, timeout=120)
    last = found.stderr.splitlines()[-1]
    said = f"croco.errors.UserError: model '{large}': its weights do not fit in the memory of cpu ("
    assert last.startswith(said)
    assert last.endswith("): expected no other process there, or a smaller model")


HELD = """
import psutil
import torch
from croco.models.memory import give_back

def resident():
    return psutil.Process().memory_info().rss / 2**20

torch.ones(2**22)  # 16 MiB: once it is freed, glibc takes smaller ones from its heap
before = resident()
blocks = [torch.ones(2**18) for _ in range(400)]  # of 1 MiB
del blocks[::2]  # no two beside each other: nothing goes back by itself
held = resident() - before - len(blocks)
give_back()
print(held, resident() - before - len(blocks))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts what is resident as Linux does")
def test_what_is_not_used_any_more_goes_back_to_the_system() -> None:
    # in a process of its own: in this one earlier tests have left room in the heap
    found = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=120)
    held, left = map(float, found.stdout.split())
    assert held > 150
    assert left < 50
