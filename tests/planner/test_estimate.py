"""The sums: against counts made by hand from the published configurations, and what sharding divides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.errors import ArgumentError
from llamafactory_sekd.planner.estimate import copies_nothing, estimate, state_bytes
from llamafactory_sekd.planner.memory_report import devices_of_the_environment, parse_memory, price, remedies_for
from llamafactory_sekd.planner.planned_run import Blueprint, Run, Sharding, TeacherPlace, read_deepspeed


ZERO_3 = Path(__file__).parents[2] / "examples" / "deepspeed" / "ds_z3_config.json"
# Llama-1: the paper's student (6,738,415,616 parameters) and teacher (13,015,864,320).
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
P7, P13 = 6_738_415_616, 13_015_864_320
# The same with two layers each, for what does not depend on their number.
SHORT_7B, SHORT_13B = ({**sizes, "num_hidden_layers": 2} for sizes in (LLAMA_7B, LLAMA_13B))


def parameters_of(sizes):
    """By hand: embedding, head and last norm; per layer four projections, three of the MLP, two norms."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    layer = 4 * width * width + 3 * width * inner + 2 * width
    return 2 * 32000 * width + width + sizes["num_hidden_layers"] * layer


S7, S13 = parameters_of(SHORT_7B), parameters_of(SHORT_13B)


def llama(sizes, dtype=torch.float16):
    config = LlamaConfig(vocab_size=32000, **sizes)

    def build():
        model = AutoModelForCausalLM.from_config(config, torch_dtype=dtype)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    return Blueprint(build)


def by_name(result):
    return {row.name: row for row in result.rows}


@pytest.fixture(scope="module")
def papers():
    sharding = read_deepspeed(json.loads(ZERO_3.read_text()), 4096)
    return Run(
        llama(LLAMA_7B),
        llama(LLAMA_13B),
        DistillationArguments(teacher_model="x"),
        batch_size=4,
        length=512,
        accumulation=4,
        engine_dtype=torch.bfloat16,
        devices=8,
        sharding=sharding,
    )


@pytest.fixture(scope="module")
def short(papers):
    return replace(papers, student=llama(SHORT_7B), teacher=llama(SHORT_13B))


def test_the_published_sizes_are_those_of_the_configurations():
    assert (parameters_of(LLAMA_7B), parameters_of(LLAMA_13B)) == (P7, P13)


def test_the_papers_run_is_the_sum_of_its_terms_and_fits_eight_devices_of_80_gb(papers):
    result = estimate(papers)
    rows = by_name(result)
    assert rows["parameters"].step == 2 * P7 // 8
    assert rows["gradients"].step == 2 * P7 // 8
    assert rows["optimizer states"].step == 12 * P7 // 8
    assert rows["optimizer's copies"].step == 4 * P7 // 8
    assert rows["teacher"].step == 2 * P13 // 8
    # Gradient checkpointing keeps the input of each of 32 layers: 4 x 512 x 4,096 numbers of 2 bytes.
    assert 32 * 4 * 512 * 4096 * 2 <= rows["activations"].backward < 3 * 32 * 4 * 512 * 4096 * 2
    assert result.device < 25 * 2**30


@pytest.mark.parametrize(
    ("stage", "optimizer", "gradients", "parameters"), [(0, 1, 1, 1), (1, 8, 1, 1), (2, 8, 8, 1), (3, 8, 8, 8)]
)
def test_each_stage_of_zero_divides_what_it_shards(short, stage, optimizer, gradients, parameters):
    rows = by_name(estimate(replace(short, sharding=Sharding(stage))))
    assert rows["optimizer states"].step == 12 * S7 // optimizer
    assert rows["gradients"].step == 2 * S7 // gradients
    assert rows["parameters"].step == 2 * S7 // parameters
    assert rows["teacher"].step == 2 * S13 // parameters
    assert ("gathered weights" in rows) == (stage == 3)


def test_what_is_offloaded_counts_as_main_memory(short):
    kept = estimate(short)
    sharding = replace(short.sharding, offload_optimizer=True, offload_param=True)
    result = estimate(replace(short, sharding=sharding))
    assert result.host == (2 + 2 + 12) * S7 // 8 + 2 * S13 // 8
    assert result.step < kept.step - result.host


def test_a_teacher_is_counted_where_it_is_placed():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    keys = DistillationArguments(teacher_model="x")
    run = Run(llama(sizes), llama(sizes), keys, batch_size=1, length=32)
    bytes_, head = 2 * parameters_of(sizes), 2 * 32000 * 64

    def row(**place):
        return by_name(estimate(replace(run, place=TeacherPlace(**place))))["teacher"]

    assert (row().step, row().host) == (bytes_, 0)
    assert (row(kind="main memory").step, row(kind="main memory").host) == (head, bytes_)
    assert (row(kind="another device").step, row(kind="another device").host) == (head, 0)
    streamed = row(kind="main memory", streamed=True)
    assert head < streamed.step <= 2 * head
    assert (row(kind="student", adapters=1000).step, row(kind="student", adapters=1000).host) == (1000, 0)


def test_a_teacher_with_an_engine_of_its_own_is_sharded_as_that_says(short):
    zero_2, zero_3 = Sharding(2), replace(short.sharding, offload_param=True)
    rows = by_name(estimate(replace(short, sharding=zero_2, place=TeacherPlace(sharding=zero_3))))
    assert (rows["teacher"].step, rows["teacher"].host) == (0, 2 * S13 // 8)
    assert rows["parameters"].step == 2 * S7
    assert rows["gathered weights"].backward > 0
    rows = by_name(estimate(replace(short, place=TeacherPlace(sharding=Sharding(0)))))
    assert rows["teacher"].step == 2 * S13


def test_remedies_of_a_teacher_that_is_cached_are_over(short):
    config = {"teacher_model": "x", "teacher_model_adapters": "y", "finetuning_type": "full"}
    keys = [remedy.keys for remedy in remedies_for(config, short)]
    assert {"teacher_offload": True} in keys
    (cache,) = (changed for changed in keys if "teacher_cache" in changed)
    assert (cache["teacher_model"], cache["teacher_model_adapters"]) == (None, None)

    def plan(changed):
        assert not ("teacher_cache" in changed and "teacher_offload" in changed)
        return type("Estimate", (), {"device": 90 - len(changed)})()

    assert list(price(config, short, needed=100, memory=0, plan=plan))
    on_the_students_base = replace(short, place=TeacherPlace("student"))
    assert not [item for item in remedies_for(config, on_the_students_base) if "teacher_" in item.text]


def test_mixed_precision_keeps_float32_and_ddp_a_second_set_of_gradients():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    run = Run(
        llama(sizes, torch.float32),
        None,
        None,
        batch_size=1,
        length=32,
        autocast=torch.bfloat16,
        devices=2,
        optimizer="adamw_torch",
    )
    rows, count = by_name(estimate(run)), 2 * 32000 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert rows["parameters"].step == rows["gradients"].step == rows["buckets"].step == 4 * count
    assert rows["optimizer states"].step == 8 * count
    assert rows["optimizer's copies"].step == 4 * count
    assert "teacher" not in rows


def test_a_cached_teacher_leaves_its_head_alone(short):
    result = estimate(replace(short, teacher=None))
    assert by_name(result)["teacher"].step == 32000 * 4096 * 2
    assert "as wide as the student" in result.notes[0]


def test_an_unknown_optimizer_is_noted(short):
    assert "galore" in estimate(replace(short, optimizer="galore")).notes[0]
    assert state_bytes("adamw_torch_fused") == state_bytes("paged_adamw_32bit") == 8
    assert state_bytes("adamw_bnb_8bit") == state_bytes("paged_adamw_8bit") == 2
    assert copies_nothing("adamw_torch_fused")
    assert not copies_nothing("adamw_torch")


def test_deepspeeds_file_is_read_as_the_trainer_does():
    auto = read_deepspeed(json.loads(ZERO_3.read_text()), 100)
    assert (auto.stage, auto.reduce_bucket, auto.prefetch, auto.buckets) == (3, 10_000, 9_000, 1)
    zero = {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 5e8,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
    own = read_deepspeed({"zero_optimization": zero}, 100)
    assert (own.reduce_bucket, own.buckets) == (500_000_000, 2)
    assert own.offload_optimizer
    assert not own.offload_param  # stage 3 alone has it
    assert read_deepspeed({}, 100) == Sharding(stage=0)
    assert not read_deepspeed({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, 1).offload_optimizer
    with pytest.raises(ArgumentError, match="stage: 5"):
        read_deepspeed({"zero_optimization": {"stage": 5}}, 100)


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 2**30), ("1.5 GiB", 3 * 2**29), ("40960M", 40 * 2**30), ("123", 123)]
)
def test_memory_is_read_in_powers_of_1024(text, size):
    assert parse_memory(text) == size


def test_what_is_no_size_is_quoted():
    with pytest.raises(ArgumentError, match="--memory lots"):
        parse_memory("lots")


def test_devices_are_counted_as_the_launcher_counts_them(monkeypatch):
    for name in ("WORLD_SIZE", "NNODES", "NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert devices_of_the_environment() == max(torch.cuda.device_count(), 1)
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    assert devices_of_the_environment() == 8
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert devices_of_the_environment() == 3


def test_remedies_are_those_not_taken_yet_and_end_with_the_first_that_is_enough(short):
    config = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "finetuning_type": "full"}
    names = [remedy.text.split(":")[0] for remedy in remedies_for(config, short)]
    assert names[0] == "per_device_train_batch_size"
    assert not [name for name in names if name.startswith("remove")]
    first = remedies_for({**config, "disable_gradient_checkpointing": True}, short)[0]
    assert first.keys == {"disable_gradient_checkpointing": None}

    def plan(changed):
        calls.append(changed)
        size = 100 - 30 * (changed["per_device_train_batch_size"] == 1) - 40 * ("deepspeed" in changed)
        return type("Estimate", (), {"device": size})()

    calls: list[dict] = []
    priced = list(price(config, short, needed=100, memory=35, plan=plan))
    assert [(item.alone, item.together) for item in priced] == [(70, 70), (60, 30)]
    assert calls[0]["gradient_accumulation_steps"] == 16
