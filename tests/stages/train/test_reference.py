"""The table of the reference: what it is keyed by, who may write it at once, and what stands in for it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from croco.config.training import Lora
from croco.errors import UserError
from croco.models.lora import apply_lora
from croco.stages.train.batches import collate
from croco.stages.train.encode import encode_pairs
from croco.stages.train.forward import completion_logps
from croco.stages.train.reference import no_reference, on_line, reference_logps, weights_digest
from stages.train.pairs import make_pairs, replace
from tiny import make_policy, make_tokenizer

EXAMPLES, _ = encode_pairs(make_pairs(6), make_tokenizer(), end=2, max_tokens=200)


def values(folder, model, examples=EXAMPLES, **rest):
    """The table's values, and how many examples were computed for them."""
    done = []
    found = reference_logps(
        model,
        examples,
        folder=folder,
        rows="segments",
        micro_batch_tokens=300,
        on_examples=done.append,
        **rest,
    )
    return found, sum(done)


def test_arms_share_the_pairs_they_have_in_common(tmp_path):
    first, computed = values(tmp_path, make_policy())
    assert computed == 6
    second, computed = values(tmp_path, make_policy(), [*EXAMPLES[4:], *EXAMPLES[:2]])
    assert computed == 0
    assert second.equal(first[:, [4, 5, 0, 1]])


def test_another_base_or_type_is_another_reference(tmp_path):
    values(tmp_path, make_policy())
    assert values(tmp_path, make_policy(seed=1))[1] == 6
    assert values(tmp_path, make_policy().bfloat16())[1] == 6


def test_values_that_are_damaged_are_computed_again(tmp_path, capsys):
    first, _ = values(tmp_path, make_policy())
    (path,) = tmp_path.rglob("*.parquet")
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    found, computed = values(tmp_path, make_policy())
    assert computed == 6
    assert found.equal(first)
    assert "is damaged" in capsys.readouterr().err


def test_any_one_weight_changes_the_digest():
    model = make_policy(hidden=64, vocab_size=320)
    weight = model.get_input_embeddings().weight
    assert weight.numel() > 2 * 4096  # so that not every number is in the sample
    digests = {weights_digest(model)}
    with torch.no_grad():
        for place in (0, 1, 12_345):
            weight.view(-1)[place] += 1e-6
            digests.add(weights_digest(model))
    assert len(digests) == 4


def test_a_cut_completion_is_another_one(tmp_path):
    (whole,) = EXAMPLES[:1]
    cut = replace(whole, completions=(whole.completions[0][:-1], whole.completions[1]))
    found, computed = values(tmp_path, make_policy(), [whole, cut])
    assert computed == 2
    assert found[0, 0] != found[0, 1]
    assert found[1, 0] == pytest.approx(found[1, 1].item(), rel=1e-6)


WRITER = """
import os, signal, sys
from pathlib import Path
from croco.stages.train import reference
from croco.stages.train.encode import encode_pairs
from tiny import make_policy, make_tokenizer
from stages.train.pairs import make_pairs

reference.PART_EXAMPLES = 2
examples, _ = encode_pairs(make_pairs(6), make_tokenizer(), end=2, max_tokens=200)

def on_examples(num):
    print(num, flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)

reference.reference_logps(
    make_policy(), examples, folder=Path(sys.argv[1]), rows="segments", micro_batch_tokens=300, on_examples=on_examples
)
"""


def writer(folder: Path, end: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), end], env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_writers_may_be_killed_and_run_beside_each_other(tmp_path):
    killed = writer(tmp_path, "die")
    assert killed.communicate()[0] == "2\n"
    assert killed.returncode == -signal.SIGKILL
    beside = [writer(tmp_path, "live") for _ in range(2)]
    for each in beside:  # at least the killed one's part is there for both, whoever is first
        printed = each.communicate()[0].split()
        assert each.returncode == 0
        assert sum(map(int, printed)) <= 4
    found, computed = values(tmp_path, make_policy())
    assert computed == 0
    torch.testing.assert_close(found, values(tmp_path / "alone", make_policy())[0], rtol=1e-6, atol=0)
    assert len(list(tmp_path.glob("*/part-*.parquet"))) == 3


def test_on_line_is_the_policy_without_its_adapter():
    base = make_policy()
    batch = collate(EXAMPLES, rows="segments")
    with torch.no_grad():
        expected = completion_logps(base, batch)
    model = apply_lora(base, Lora(dropout=0.5), 0).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    found = on_line(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert not found.requires_grad
    assert model.training
    with torch.no_grad():
        assert not completion_logps(model.eval(), batch).allclose(expected, rtol=1e-2)


def test_on_line_needs_an_adapter():
    with pytest.raises(UserError, match="LlamaForCausalLM has none"):
        on_line(make_policy(), collate(EXAMPLES, rows="segments"))


def test_what_stands_for_no_reference_has_its_shape(tmp_path):
    assert no_reference(EXAMPLES).shape == values(tmp_path, make_policy())[0].shape
    assert not no_reference(EXAMPLES).any()
