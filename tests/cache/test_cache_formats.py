"""What is kept of a token says as much of its distribution as it claims."""

from __future__ import annotations

import pytest
import torch

from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.objectives import distillation_loss, fused_distillation
from llamafactory_sekd.teacher.cache.formats import HiddenFormat, TopKFormat, TopKLogits, bytes_per_token


@pytest.fixture
def logits():
    return 4 * torch.randn(30, 100, generator=torch.Generator().manual_seed(0))


def restored(kept, logits):
    source = TopKLogits(kept, kept.compress(logits))
    return source.logits(slice(None), torch.empty(len(logits), kept.vocab_size))


def test_topk_keeps_the_largest_probabilities_and_the_mass_of_the_rest(logits):
    kept = TopKFormat(16, torch.float32, vocab_size=100)
    p, found = torch.softmax(logits.double(), -1), restored(kept, logits).double().exp()
    torch.testing.assert_close(found.sum(-1), torch.ones(30, dtype=torch.float64), atol=1e-6, rtol=0)
    for token in range(30):
        best = p[token].argsort(descending=True)
        torch.testing.assert_close(found[token, best[:16]], p[token, best[:16]], rtol=1e-5, atol=0)
        rest = found[token, best[16:]]
        torch.testing.assert_close(rest, p[token, best[16:]].mean().expand_as(rest), rtol=1e-5, atol=0)


def test_the_mass_of_the_rest_is_summed_where_it_is_too_small_to_be_subtracted():
    logits = torch.zeros(1, 100)
    logits[0, :16] = 60.0
    tail = TopKFormat(16, torch.float32, 100).compress(logits)["log_tail"]
    exact = torch.log(torch.tensor(84.0, dtype=torch.float64)) - (60 + torch.log(torch.tensor(16.0)))
    assert float(tail) == pytest.approx(float(exact), rel=1e-5)


def test_ids_of_no_token_are_left_out_and_the_rest_is_renormalized(logits):
    kept = TopKFormat(16, torch.float32, vocab_size=90)
    assert restored(kept, logits).exp().sum(-1) == pytest.approx(torch.ones(30), abs=1e-5)
    torch.testing.assert_close(restored(kept, logits), restored(kept, logits[:, :90]))


def test_impossible_tokens_stay_numbers(logits):
    logits[:, 10:] = -torch.inf
    found = restored(TopKFormat(16, torch.float16, vocab_size=100), logits)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(30), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "kd_loss", ["self_evolution", "reverse_kl", "self_evolution_topk", "jsd", "entropy_gate", "tvd"]
)
def test_the_fused_objective_reads_topk_in_chunks_as_the_plain_one_reads_logits(logits, kd_loss):
    torch.manual_seed(1)
    kept = TopKFormat(16, torch.float32, vocab_size=90)
    record = kept.compress(logits)
    hidden, head = torch.randn(30, 8), torch.randn(100, 8, requires_grad=True)
    labels = torch.randint(90, (30,))
    settings = {"kd_loss": kd_loss, "kd_topk": 0.4 if kd_loss.endswith("topk") else None, "kd_lambda": 0.7}
    fused = fused_distillation(
        hidden, head, TopKLogits(kept, record), labels, num_items=30, chunk_size=7, **settings
    ).loss
    (gradient,) = torch.autograd.grad(fused, head)
    plain = distillation_loss((hidden @ head.t())[:, :90], restored(kept, logits), labels, **settings).loss.sum() / 30
    (expected,) = torch.autograd.grad(plain, head)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_teacher_of_other_tokens_or_a_larger_vocabulary_is_refused(logits):
    source = TopKLogits(TopKFormat(16, torch.float32, 100), TopKFormat(16, torch.float32, 100).compress(logits))
    labels = torch.zeros(29, dtype=torch.int64)
    with pytest.raises(ArgumentError, match=r"the teacher has logits of 30 tokens over 100 entries"):
        fused_distillation(torch.randn(29, 8), torch.randn(100, 8), source, labels, num_items=1, chunk_size=4)


@pytest.mark.parametrize("k", [7, 513, 90])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ArgumentError, match=rf"`--k {k}` cannot be used: keep 8 to 512"):
        TopKFormat(k, torch.float16, 90)


def test_bytes_per_token_are_what_the_tensors_take(logits):
    small, large = TopKFormat(64, torch.float16, 32_000), TopKFormat(64, torch.float16, 152_064)
    assert (bytes_per_token(small), bytes_per_token(large)) == (64 * 4 + 4, 64 * 6 + 4)
    assert bytes_per_token(HiddenFormat(5120, torch.bfloat16)) == 10_240
    kept = TopKFormat(16, torch.float16, 100)
    record = kept.compress(logits)
    assert sum(tensor.nbytes for tensor in record.values()) == 30 * bytes_per_token(kept)
    for name, (dtype, shape) in kept.fields().items():
        assert (record[name].dtype, tuple(record[name].shape)) == (dtype, (30, *shape))
