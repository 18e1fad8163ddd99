"""Whatever the labels mask, exactly the positions before a response token count, and no others get a gradient."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_sekd.objectives import IGNORE_INDEX, distillation_loss, fused_linear_distillation, response_positions
from llamafactory_sekd.presets import PRESETS


VOCABULARY, WIDTH = 13, 6
LABELS = st.integers(1, 4).flatmap(
    lambda batch: st.integers(1, 9).flatmap(
        lambda length: st.lists(
            st.lists(
                st.one_of(st.just(IGNORE_INDEX), st.integers(0, VOCABULARY - 1)), min_size=length, max_size=length
            ),
            min_size=batch,
            max_size=batch,
        )
    )
)


@settings(max_examples=200, deadline=None)
@given(LABELS, st.sampled_from(list(PRESETS)), st.integers(1, 12), st.integers(0, 3))
def test_exactly_the_positions_before_response_tokens_count(labels, kd_loss, chunk_size, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.tensor(labels)
    rows, targets = response_positions(tensor)
    expected = [token for row in labels for token in row[1:] if token != IGNORE_INDEX]
    assert targets.tolist() == expected

    hidden = torch.randn(*tensor.shape, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    head, teacher_head = (torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher_hidden = torch.randn(*tensor.shape, WIDTH, generator=generator, dtype=torch.float64)
    keys = {"kd_loss": kd_loss, "kd_topk": 0.5 if kd_loss == "self_evolution_topk" else None}
    output = fused_linear_distillation(
        hidden[rows],
        head,
        teacher_hidden[rows],
        teacher_head,
        targets,
        num_items=max(len(expected), 1),
        chunk_size=chunk_size,
        **keys,
    )
    (gradient,) = torch.autograd.grad(output.loss, hidden)
    assert output.loss.isfinite()
    assert not gradient[~rows].any()
    if not expected:
        assert output.loss == 0
        return

    plain = distillation_loss(hidden[rows] @ head.T, teacher_hidden[rows] @ teacher_head.T, targets, **keys)
    torch.testing.assert_close(output.loss, plain.loss.mean())
