"""The last layer sees what is read and no more; that it stays exact is in `test_exact.py`."""

import pytest
import torch

from croco.stages.train.batches import collate
from croco.stages.train.encode import encode_pairs
from croco.stages.train.forward import completion_logps
from stages.train.pairs import make_pairs
from tiny import make_policy, make_tokenizer

EXAMPLES, _ = encode_pairs(make_pairs(4, longest=3), make_tokenizer(), end=2, max_tokens=200)


@pytest.mark.parametrize("arch", ["llama", "cohere2", "qwen3", "gemma3", "mistral"])
def test_the_last_layer_is_finished_where_completions_are_predicted(arch):
    model, batch = make_policy(arch).train(), collate(EXAMPLES, rows="segments")
    places = len(batch.source_M.unique())
    whole = batch.input_ids_BT.numel()
    assert places < 0.9 * whole
    counts = []
    for layer in model.model.layers:
        for part in (
            layer.self_attn.q_proj,
            layer.self_attn.o_proj,
            layer.mlp,
        ):  # a hook after the forward sees what it was given
            part.register_forward_hook(lambda m, args, out: counts.append(args[0].shape[:-1].numel()))
    completion_logps(model, batch)
    assert counts == [whole] * 3 + [places] * 3


def test_all_of_it_where_layers_run_again_and_in_plain_rows():
    model, batch = make_policy().train(), collate(EXAMPLES, rows="segments")
    outputs = []
    model.model.layers[-1].mlp.register_forward_hook(lambda m, args, out: outputs.append(args[0].shape))
    completion_logps(model, collate(EXAMPLES, rows="plain"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    completion_logps(model, batch)
    assert [shape[:-1] for shape in outputs] == [
        torch.Size([8, collate(EXAMPLES, rows="plain").input_ids_BT.shape[1]]),
        batch.input_ids_BT.shape,
    ]
