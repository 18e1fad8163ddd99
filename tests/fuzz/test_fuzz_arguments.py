"""Whatever a key is set to, it is refused in one line that names a key, or the objective it gives is finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers.runs import base_config
from hypothesis import given, settings
from hypothesis import strategies as st
from llamafactory.hparams.parser import get_train_args

from llamafactory_sekd.argument_checks import check_distillation_arguments
from llamafactory_sekd.arguments import KEYS, DistillationArguments
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.objectives import fused_linear_distillation
from llamafactory_sekd.presets import PRESETS


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**6),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=8),
    st.lists(st.integers(0, 2), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)
SENSIBLE = {
    "teacher_model": st.just("some/teacher"),
    "teacher_model_device": st.sampled_from(["auto", "cpu", "cuda:0"]),
    "teacher_offload": st.booleans(),
    "kd_loss": st.sampled_from(list(PRESETS)),
    "kd_lambda": st.floats(0, 1),
    "kd_beta": st.floats(0, 1),
    "kd_gamma": st.one_of(st.just("auto"), st.floats(-1, 10), st.floats(-1, 10).map(str)),
    "kd_topk": st.one_of(st.none(), st.floats(0, 1, exclude_min=True)),
    "kd_hard_scale": st.sampled_from(["none", "balanced"]),
    "kd_temperature": st.floats(0.1, 10),
}
CONFIGURATIONS = st.fixed_dictionaries(
    {"teacher_model": st.one_of(SENSIBLE["teacher_model"], SENSIBLE["teacher_model"], ANYTHING)},
    optional={
        key: st.one_of(SENSIBLE[key], ANYTHING) if key in SENSIBLE else ANYTHING
        for key in KEYS
        if key != "teacher_model"
    },
)


def assert_clear(error: ArgumentError, keys: tuple[str, ...]) -> None:
    message = str(error)
    assert "\n" not in message
    assert any(f"`{key}" in message for key in keys), message


@settings(max_examples=400, deadline=None)
@given(configuration=CONFIGURATIONS)
def test_keys_are_refused_clearly_or_give_a_finite_objective(configuration):
    try:
        args = DistillationArguments(**configuration)
        check_distillation_arguments(args)
    except ArgumentError as error:
        assert_clear(error, KEYS)
        return

    generator = torch.Generator().manual_seed(0)
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(rows, 4, generator=generator, requires_grad=True) for rows in (5, 11, 5, 11)
    )
    output = fused_linear_distillation(
        hidden,
        head,
        teacher_hidden.detach(),
        teacher_head.detach(),
        torch.tensor([0, 3, 10, 3, 7]),
        num_items=5,
        chunk_size=args.kd_chunk_size or 2,
        **args.objective_keywords(),
    )
    output.loss.backward()
    assert output.loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert head.grad.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(configuration=CONFIGURATIONS)
def test_the_hosts_parser_says_the_same_of_a_complete_yaml(configuration, tmp_path_factory):
    config = base_config(tmp_path_factory.getbasetemp(), output_dir=str(tmp_path_factory.getbasetemp() / "none"))
    ours = _refusal(lambda: check_distillation_arguments(DistillationArguments(**configuration)))
    host_refusal = _refusal(lambda: get_train_args({**config, **configuration}))
    if ours is not None:
        assert host_refusal == ours
    elif (
        host_refusal is not None
    ):  # what needs the machine or the student comes later: CUDA, DeepSpeed's files, data sets
        assert any(word in host_refusal for word in ("CUDA", "teacher_deepspeed", "data set"))


def _refusal(call: Callable[[], object]) -> str | None:
    try:
        call()
    except ArgumentError as error:
        return str(error)

    return None
