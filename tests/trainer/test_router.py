"""The router's loss of mixtures of experts counts as it does in the host's SFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.runs import base_config, logged, train, weights
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}
MODELS = {
    "mixtral": lambda **more: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, **more)),
    "qwen3_moe": lambda **more: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, num_experts=4, moe_intermediate_size=16, head_dim=8, **more)
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def moe_root(request, tiny_root, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    for name in ("teacher", "data"):
        (root / name).symlink_to(tiny_root / name)
    tokenizer = tiny.save_tokenizer(root / "student")
    torch.manual_seed(3)
    model = MODELS[request.param](eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(root / "student")
    return root


def both(root: Path, out: Path, **keys: Any) -> tuple[Path, Path]:
    common = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "flash_attn": "disabled",
    }
    ours = {"kd_loss": "forward_kl", "kd_lambda": 0.0}
    theirs = {"stage": "sft", "teacher_model": None}
    return (
        train(base_config(root, output_dir=str(out / "sekd"), **common, **ours, **keys)),
        train(base_config(root, output_dir=str(out / "sft"), **common, **theirs, **keys)),
    )


@pytest.mark.parametrize(
    "keys",
    [{}, {"use_reentrant_gc": False}, {"disable_gradient_checkpointing": True}],
    ids=["reentrant", "not reentrant", "no checkpointing"],
)
def test_the_routers_loss_is_that_of_sft(moe_root, tmp_path, keys):
    sekd, sft = both(moe_root, tmp_path, moe_aux_loss_coef=0.5, **keys)
    assert logged(sekd, "loss") == pytest.approx(logged(sft, "loss"), abs=2e-4)
    for name, value in weights(sft).items():
        torch.testing.assert_close(weights(sekd)[name], value, atol=5e-5, rtol=1e-5)
    assert all(value > 0.4 for value in logged(sekd, "aux_loss"))


def test_without_the_key_there_is_no_routers_loss(moe_root, tmp_path):
    sekd, sft = both(moe_root, tmp_path)
    assert logged(sekd, "loss") == pytest.approx(logged(sft, "loss"), abs=2e-4)
    assert not logged(sekd, "aux_loss")
