"""The same trainings on one rank and on two, under each engine, with one launch per engine."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from helpers.forks import forked_ranks
from helpers.runs import CLI, base_config


SEQUENCE = str(Path(__file__).with_name("run_sequence.py"))
# Every objective whose loss is per token.
PER_TOKEN = {
    "self_evolution": {"kd_gamma": 1.0},
    "no_evolution": {},
    "skew": {"kd_beta_end": 1.0},
    "skew_teacher": {"kd_beta": 0.9},
    "forward_kl": {"kd_temperature": 2.0},
    "reverse_kl": {},
}


def save_uneven_dataset(directory: Path) -> None:
    """30 records for batches of 8; the second four have no response left, and lengths differ by a factor of four."""
    records = json.loads((directory / "tiny.json").read_text())[:30]
    for index, record in enumerate(records):
        if 4 <= index < 8:
            record["input"] = "far " * 200  # the prompt alone is longer than the cutoff
        elif index % 5 == 0:
            record["input"] = " ".join([record["input"]] * 4)
            record["output"] = " ".join([record["output"]] * (1 + index % 3))
    (directory / "uneven.json").write_text(json.dumps(records))
    (directory / "seven.json").write_text(json.dumps(records[-7:]))
    info = json.loads((directory / "dataset_info.json").read_text())
    info |= {name: {"file_name": f"{name}.json"} for name in ("uneven", "seven")}
    (directory / "dataset_info.json").write_text(json.dumps(info))


def trainings(root: Path, out: Path, ranks: int, fsdp1: bool = False, **engine: Any) -> list[dict[str, Any]]:
    """One training per objective, and one over two complete epochs of uneven data with evaluation."""
    common = {
        "optim": "sgd",
        "learning_rate": 0.05,
        "per_device_train_batch_size": 8 // ranks,
        "gradient_accumulation_steps": 1,
        **engine,
    }
    configs = [
        base_config(root, output_dir=str(out / kd_loss), kd_loss=kd_loss, max_steps=2, **common, **keys)
        for kd_loss, keys in PER_TOKEN.items()
    ]
    uneven = {
        "dataset": "uneven",
        "eval_dataset": "seven",
        "eval_strategy": "epoch",
        "per_device_eval_batch_size": 4 // ranks,
        "num_train_epochs": 2,
        "max_steps": -1,
        "kd_gamma": "auto",
        "kd_hard_scale": "balanced",
        "disable_shuffling": True,
    }
    configs.append(base_config(root, output_dir=str(out / "uneven"), **{**common, **uneven}))
    if not fsdp1:  # which refuses own samples
        # So few that in some steps only one of the ranks has any. The epoch's second step has a single micro-batch of
        # four examples, all of which one of the ranks has.
        own = {"kd_loss": "reverse_kl", "kd_on_policy": 0.15, "kd_on_policy_every": 2, "max_samples": 28}
        own |= {"max_new_tokens": 8, "max_steps": 5, "gradient_accumulation_steps": 3}
        configs.append(base_config(root, output_dir=str(out / "on_policy"), **{**common, **own}))
    return configs


def teachers(root: Path, out: Path, ranks: int, zero: int | None = None, **engine: Any) -> list[dict[str, Any]]:
    """Trainings whose teacher is elsewhere: on the student's base, in main memory, in an engine of its own."""
    common = {
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_steps": 2,
        "kd_gamma": 1.0,  # as in the training of this objective above
        "per_device_train_batch_size": 8 // ranks,
        **engine,
    }
    # DeepSpeed drops an empty group of parameters, as that without weight decay is of LoRA alone, and the scheduler
    # of torch 2.14 stumbles over that (in the host's own SFT, too); a norm fills it.
    adapters = {"finetuning_type": "lora", "lora_target": "all", "additional_target": "norm", "learning_rate": 0.5}
    keys: dict[str, dict[str, Any]] = {"offloaded": {"teacher_offload": True}}
    if zero is not None:
        keys["own_engine"] = {"teacher_deepspeed": zero_config(out, 3 if zero != 3 else 0)}
    keys["shared"] = {**adapters, "teacher_model": "self", "teacher_model_adapters": str(root / "adapter")}
    if zero != 3:
        keys["device"] = {"teacher_model_device": "cpu"}
    return [base_config(root, output_dir=str(out / name), **{**common, **own}) for name, own in keys.items()]


def save_adapter(root: Path) -> None:
    """Adapters of a teacher that has the student's base."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(root / "student")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(root / "adapter")


def zero_config(directory: Path, stage: int) -> str:
    """A DeepSpeed configuration in float32; `auto` is filled in by the trainer."""
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    return str(path)


def fsdp_config(directory: Path, version: int) -> str:
    """A configuration of `accelerate launch` on the CPU."""
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": version,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_state_dict_type": "FULL_STATE_DICT",
            # FSDP1 synchronizes such weights over an accelerator only, and says so.
            "fsdp_cpu_ram_efficient_loading": version == 2,
            "fsdp_sync_module_states": version == 2,
        },
        "machine_rank": 0,
        "num_machines": 1,
        "num_processes": 2,
        "main_process_port": free_port(),
        "use_cpu": True,
        "mixed_precision": "no",
    }
    if version == 2:
        config["fsdp_config"]["fsdp_reshard_after_forward"] = True
    else:
        config["fsdp_config"] |= {"fsdp_sharding_strategy": "FULL_SHARD", "fsdp_use_orig_params": True}
    path = directory / f"fsdp{version}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun(*arguments: str) -> list[str]:
    program = str(Path(sys.executable).with_name("torchrun"))
    return [program, "--nproc_per_node", "2", "--master_port", str(free_port()), *arguments]


def accelerate(config_file: str, *arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", config_file, *arguments]


def fsdp_environment(directory: Path, version: int) -> dict[str, str]:
    """What `accelerate launch` tells its ranks, by its own function."""
    from accelerate.commands import launch as command_line
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = ["--config_file", fsdp_config(directory, version), SEQUENCE]
    arguments = command_line.launch_command_parser().parse_args(arguments)
    with patch.dict(os.environ):
        environment = prepare_multi_gpu_env(command_line._validate_launch_command(arguments)[0])
    return {key: value for key, value in environment.items() if os.environ.get(key) != value}


def launch(jobs: list[dict[str, Any]], directory: Path, env: dict[str, str] | None = None) -> None:
    """Run all trainings on two ranks, one after the other."""
    result = forked_ranks([sys.executable, *sequence(jobs, directory)], env=env, cwd=directory)
    assert result.returncode == 0, result.stderr[-6000:]


def sequence(jobs: list[dict[str, Any]], directory: Path) -> list[str]:
    path = directory / "jobs.json"
    path.write_text(json.dumps([{"config": config} for config in jobs]))
    return [SEQUENCE, str(path)]


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": os.pathsep.join([str(Path(CLI).parent), os.environ["PATH"]]), "OMP_NUM_THREADS": "1"}
