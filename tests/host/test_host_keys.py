"""Every key of the host acts in a run of our stage as it does in SFT, or is refused by its name."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import base_config, logged, train, weights
from llamafactory.hparams import get_train_args, parser
from transformers import AutoModelForCausalLM

from llamafactory_sekd.arguments import KEYS
from llamafactory_sekd.errors import SekdError


# Each run sets keys that do not get in each other's way; the run with a teacher at λ = 0 must be the run of SFT.
RUNS: dict[str, dict[str, Any]] = {
    "optimizer": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-6,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"lr_end": 1e-4},
        "warmup_steps": 1,
        "optim": "adamw_torch",
        "seed": 3,
        "data_seed": 4,
        "average_tokens_across_devices": False,
        "include_num_input_tokens_seen": True,
        "include_tokens_per_second": True,
        "include_effective_tokens_per_second": True,
        "neftune_noise_alpha": 5.0,
        "upcast_layernorm": True,
        "upcast_lmhead_output": True,
    },
    "other optimizer": {
        "use_muon": True,
        "warmup_ratio": 0.5,
        "num_train_epochs": 1.0,
        "max_steps": 2,
        "dataloader_drop_last": True,
        "group_by_length": True,
        "use_reentrant_gc": False,
        "flash_attn": "disabled",
        "rope_scaling": "linear",
        "cutoff_len": 4096,  # beyond the models' positions, or the host leaves them as they are
        "torch_empty_cache_steps": 1,
        "auto_find_batch_size": True,
        "full_determinism": False,
    },
    "evaluation": {
        "do_eval": True,
        "eval_dataset": "tiny_valid",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "eval_delay": 0,
        "per_device_eval_batch_size": 16,  # in several batches of unequal length ours is the mean over tokens
        "eval_accumulation_steps": 1,
        "compute_accuracy": True,
        "include_for_metrics": ["loss"],
        "disable_shuffling": True,
        "optim": "adafactor",
        "train_from_scratch": True,
    },
    "data": {
        "dataset": "tiny,tiny_valid",
        "mix_strategy": "interleave_under",
        "interleave_probs": "0.5,0.5",
        "max_samples": 12,
        "cutoff_len": 40,
        "val_size": 0.25,
        "do_eval": True,
        "mask_history": True,
        "ignore_pad_token_for_loss": False,
        "default_system": "Translate.",
        "template": "qwen",
        "disable_gradient_checkpointing": True,
        "dataloader_num_workers": 1,
        "dataloader_prefetch_factor": 2,
        "dataloader_persistent_workers": True,
    },
    "stream": {
        "streaming": True,
        "buffer_size": 8,
        "preprocessing_batch_size": 8,
        "accelerator_config": {"dispatch_batches": False},
        "ignore_data_skip": True,
        "dataloader_num_workers": 1,
    },
    "packing": {"packing": True, "cutoff_len": 128},
    "neat packing": {"neat_packing": True, "cutoff_len": 128, "bf16": True, "flash_attn": "sdpa"},
    "lora": {
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "lora_target": "q_proj,v_proj,gate_proj",
        "use_rslora": True,
        "use_dora": True,
        "loraplus_lr_ratio": 4.0,
        "loraplus_lr_embedding": 1e-3,
        "additional_target": "embed_tokens,lm_head",
    },
    "pissa": {"finetuning_type": "lora", "pissa_init": True, "pissa_iter": -1, "pissa_convert": False},
    "freeze": {
        "finetuning_type": "freeze",
        "freeze_trainable_layers": 1,
        "freeze_trainable_modules": "mlp",
        "freeze_extra_modules": "embed_tokens",
        "resize_vocab": True,
        # Not in an evaluation: transformers counts the first token there, which nothing predicts; our mean does not.
        "train_on_prompt": True,
    },
    "llama pro": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "use_llama_pro": True},
    "thinking": {
        "template": "qwen3",
        "enable_thinking": False,
        "preprocessing_num_workers": 2,
        "tool_format": "qwen",
        "use_fast_tokenizer": True,
        "split_special_tokens": True,
        "optim": "adamw_torch",
        "gradient_checkpointing": True,
    },
    "each evaluation": {
        "do_eval": True,
        "eval_dataset": "tiny,tiny_valid",
        "eval_on_each_dataset": True,
        "eval_strategy": "epoch",
        "prediction_loss_only": True,
        "dataloader_pin_memory": False,
    },
    "oft": {
        "finetuning_type": "oft",
        "oft_rank": 0,
        "oft_block_size": 8,
        "module_dropout": 0.0,
        "oft_target": "q_proj",
    },
}

RUNS |= {
    "evaluation loop": {
        "do_eval": True,
        "eval_dataset": "tiny_valid",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "compute_accuracy": True,
        "batch_eval_metrics": True,
        "eval_use_gather_object": True,
        "eval_do_concat_batches": True,
        "include_inputs_for_metrics": False,
        "label_names": ["labels"],
        "remove_unused_columns": True,
        "length_column_name": "length",
        "debug": "underflow_overflow",
        "skip_memory_metrics": False,
        "logging_nan_inf_filter": False,
        "print_param_status": True,
        "preserve_thinking": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "adafactor": True,
        "tf32": False,
    },
    "bf16 evaluation": {"do_eval": True, "eval_dataset": "tiny_valid", "bf16_full_eval": True},
    # Without a GPU the training stays in float32; the evaluation does not.
    "fp16": {"fp16": True, "fp16_full_eval": True, "do_eval": True, "eval_dataset": "tiny_valid"},
    "kernels": {"use_v1_kernels": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "files": {
        "tokenized_path": "{tmp}/tokenized",
        "save_strategy": "steps",
        "save_steps": 1,
        "save_safetensors": False,
        "low_cpu_mem_usage": False,
        "data_shared_file_system": True,
        "enable_torch_profiler": True,
        "profiler_output_dir": "{tmp}/profile",
    },
}

# Runs that need a package which the host asks for: the same comparison where it is installed.
PACKAGED: dict[str, tuple[str, dict[str, Any]]] = {
    "galore": (
        "galore_torch",
        {
            "use_galore": True,
            "optim": "adamw_torch",  # of the newer ones the host knows no GaLore
            "galore_target": "mlp,self_attn",
            "galore_rank": 4,
            "galore_update_interval": 1,
            "galore_scale": 0.5,
            "galore_proj_type": "right",
        },
    ),
    "galore by layer": (
        "galore_torch",
        {"use_galore": True, "optim": "adamw_torch", "galore_rank": 4, "galore_layerwise": True},
    ),
    "apollo": (
        "apollo_torch",
        {
            "use_apollo": True,
            "optim": "adamw_torch",
            "apollo_target": "mlp",
            "apollo_rank": 4,
            "apollo_update_interval": 1,
            "apollo_scale": 16.0,
            "apollo_proj": "random",
            "apollo_proj_type": "std",
            "apollo_scale_type": "channel",
            "apollo_scale_front": True,
        },
    ),
    "apollo by layer": (
        "apollo_torch",
        {"use_apollo": True, "optim": "adamw_torch", "apollo_rank": 4, "apollo_layerwise": True},
    ),
    "badam": (
        "badam",
        {
            "use_badam": True,
            "badam_mode": "layer",  # of one block at a time, so the head is frozen in most steps
            "badam_start_block": 0,
            "badam_switch_mode": "ascending",
            "badam_switch_interval": 1,
            "badam_verbose": 0,
        },
    ),
    "badam by ratio": (
        "badam",
        {
            "use_badam": True,
            "optim": "adamw_torch",
            "badam_mode": "ratio",
            "badam_update_ratio": 0.2,
            "badam_mask_mode": "adjacent",
        },
    ),
    "adam mini": ("adam_mini", {"use_adam_mini": True}),
    "optimizer with arguments": (
        "galore_torch",
        {"optim": "galore_adamw", "optim_target_modules": ["mlp"], "optim_args": "rank=4"},
    ),
    "4 bits": (
        "bitsandbytes",
        {
            "finetuning_type": "lora",
            "quantization_bit": 4,
            "quantization_method": "bnb",
            "quantization_type": "fp4",
            "double_quantization": False,
        },
    ),
    "8 bits": ("bitsandbytes", {"finetuning_type": "lora", "quantization_bit": 8, "optim": "adamw_bnb_8bit"}),
    "hqq": ("hqq", {"finetuning_type": "lora", "quantization_bit": 4, "quantization_method": "hqq"}),
    # Autocast to bfloat16, and its rounding of the gradients is made larger by that of eight bits.
    "fp8 after bf16": ("torchao", {"fp8": True, "fp8_backend": "torchao"}),
}

# Refused by the host itself where there is no GPU, with or without a teacher; in the same words in both stages.
HOSTS_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "pure_bf16": ({"pure_bf16": True}, "does not support `pure_bf16`"),
    "shift_attn": ({"shift_attn": True}, "transformers>=4"),
    "use_unsloth_gc": ({"use_unsloth_gc": True}, "NVIDIA|CUDA"),
    "fp8_backend": ({"fp8": True, "fp8_backend": "te"}, "transformer_engine"),
    "eetq": (
        {"finetuning_type": "lora", "quantization_bit": 8, "quantization_method": "eetq"},
        "eetq",
    ),
}

# Refused by name: they would have no effect, or replace the loss that the stage computes.
REFUSED: dict[str, Any] = {
    "use_kt": True,
    "use_unsloth": True,
    "mixture_of_depths": "convert",
    "label_smoothing_factor": 0.1,
    "use_dft_loss": True,
    "use_eaft_loss": True,
    "use_asft_loss": True,
    "use_hyper_parallel": True,
    "past_index": 0,
}

# What tells why a key needs no run here.
_OTHER_STAGE = "read by another stage or command alone"
_FILES = "where files, logs and downloads are, and who may read them"
# Liger's kernels take no None under Triton's interpreter, so that they cannot be tried on a CPU.
_DEVICE = "needs a device or ranks; tests/distributed and the notes on engines cover what acts there"
_INPUTS = "media of multimodal models, read by the data pipeline before either trainer"
_OF_A_REFUSED_KEY = "a detail of a key that is refused"
_HOST_SETS_IT = "the host or transformers sets or ignores it"
_OWN_TEST = "has a test of its own: "
REASONS: dict[str, str] = {
    _OTHER_STAGE: (
        "infer_backend use_kv_cache infer_dtype export_dir export_size export_device export_quantization_bit "
        "export_quantization_dataset export_quantization_nsamples export_quantization_maxlen export_legacy_format "
        "export_hub_model_id vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config "
        "sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend pref_beta pref_ftx "
        "pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma "
        "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model ref_model_adapters "
        "ref_model_quantization_bit reward_model reward_model_adapters reward_model_quantization_bit "
        "reward_model_type ld_alpha do_sample temperature top_p top_k num_beams max_length max_new_tokens "
        "repetition_penalty length_penalty skip_special_tokens do_predict"
    ),
    _FILES: (
        "adapter_folder cache_dir model_revision hf_hub_token ms_hub_token om_hub_token "
        "trust_remote_code offload_folder dataset_dir media_dir overwrite_cache "
        "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode "
        "swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret plot_loss output_dir "
        "overwrite_output_dir log_level log_level_replica log_on_each_node logging_dir logging_strategy "
        "logging_first_step logging_steps save_total_limit "
        "save_on_each_node save_only_model restore_callback_states_from_checkpoint run_name "
        "disable_tqdm report_to project trackio_space_id push_to_hub hub_model_id hub_strategy hub_token "
        "hub_private_repo hub_always_push hub_revision push_to_hub_model_id push_to_hub_organization "
        "push_to_hub_token profiler_wait_steps "
        "profiler_warmup_steps profiler_active_steps profiler_repeat profiler_record_shapes "
        "profiler_profile_memory profiler_with_stack profile_modules "
    ),
    _INPUTS: (
        "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels "
        "video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate freeze_vision_tower "
        "freeze_multi_modal_projector freeze_language_model"
    ),
    _OF_A_REFUSED_KEY: (
        "kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
        "kt_lora_expert_intermediate_size hyper_parallel_args use_mca asft_alpha eaft_alpha"
    ),
    _DEVICE: (
        "enable_liger_kernel use_liger_kernel liger_kernel_config quantization_device_map "
        "fp16_opt_level fp16_backend half_precision_backend local_rank "
        "ddp_backend tpu_num_cores tpu_metrics_debug fsdp fsdp_min_num_params fsdp_config "
        "fsdp_transformer_layer_cls_to_wrap parallelism_config deepspeed ddp_find_unused_parameters "
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_timeout torchdynamo "
        "torch_compile_mode ray_scope ray_num_workers ray_init_kwargs master_addr master_port "
        "fp8_enable_fsdp_float8_all_gather mp_parameters no_cuda use_cpu use_mps_device jit_mode_eval"
    ),
    _HOST_SETS_IT: ("per_gpu_train_batch_size per_gpu_eval_batch_size use_legacy_prediction_loop sortish_sampler"),
    _OWN_TEST + "tests/trainer/test_router.py": "moe_aux_loss_coef",
    _OWN_TEST
    + "tests/teacher/test_loading.py": "add_tokens add_special_tokens new_special_tokens_config init_special_tokens",
    _OWN_TEST + "tests/teacher/test_shared.py": "adapter_name_or_path create_new_adapter",
    _OWN_TEST + "tests/faults/test_checkpoints.py and tests/study": (
        "resume_from_checkpoint load_best_model_at_end metric_for_best_model greater_is_better early_stopping_steps"
    ),
    "generation by the host, which asks no teacher": (
        "eval_num_beams predict_with_generate generation_max_length generation_num_beams generation_config"
    ),
}


def test_every_key_of_the_host_has_a_row():
    """A key that a new host brings fails here until somebody has looked at what it does in our stage."""
    classes = ("ModelArguments", "DataArguments", "TrainingArguments", "FinetuningArguments", "GeneratingArguments")
    names = {item.name for name in classes for item in fields(getattr(parser, name)) if item.init}
    tried = [*RUNS.values(), *(keys for _, keys in PACKAGED.values()), *(keys for keys, _ in HOSTS_REFUSALS.values())]
    in_runs = {key for keys in tried for key in keys}
    rows = [*in_runs, *REFUSED, *(key for keys in REASONS.values() for key in keys.split())]
    base = {"model_name_or_path", "stage", "do_train"}
    assert len(rows) == len(set(rows)), sorted(key for key in set(rows) if rows.count(key) > 1)
    assert names - set(KEYS) - base == set(rows) & names, sorted(names - set(KEYS) - base - set(rows))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_at_lambda_zero_is_that_of_sft(tiny_root, tmp_path, name):
    _compare(tiny_root, tmp_path, RUNS[name], tolerance=2e-2 if "bf16" in str(RUNS[name]) else 2e-4)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_run_with_a_package_of_the_hosts_is_that_of_sft(tiny_root, tmp_path, name):
    package, keys = PACKAGED[name]
    pytest.importorskip(package, reason=f"the host needs {package} for it, which is not installed")
    _compare(tiny_root, tmp_path, keys, tolerance=2e-2 if "bf16" in name else 2e-4)


def _compare(tiny_root: Path, tmp_path: Path, keys: dict[str, Any], tolerance: float) -> None:
    ours = {"kd_loss": "forward_kl", "kd_lambda": 0.0, "kd_max_cut": 1.0}  # some runs cut their examples
    theirs = {"stage": "sft", "teacher_model": None}
    common = {"max_steps": 2, "use_cpu": not torch.cuda.is_available(), **keys}
    sekd, sft = (
        train(
            base_config(
                tiny_root, output_dir=str(tmp_path / stage), **_in(tmp_path / f"of {stage}", {**common, **own})
            )
        )
        for stage, own in (("sekd", ours), ("sft", theirs))
    )
    _same(sekd, sft, tolerance)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the host takes most of them")
@pytest.mark.parametrize("name", HOSTS_REFUSALS)
def test_what_the_host_refuses_without_a_gpu_it_refuses_in_our_stage_alike(tiny_root, tmp_path, name):
    keys, words = HOSTS_REFUSALS[name]
    said = []
    for own in ({}, {"stage": "sft", "teacher_model": None}):
        config = base_config(tiny_root, output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, **keys, **own)
        with pytest.raises(Exception, match=words) as caught:
            train(config)
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]


def test_weights_in_bfloat16_alone_train_as_in_sft(tiny_root, tmp_path, monkeypatch):
    """`pure_bf16` on weights that are saved so; the host asks for a GPU, and nothing in the run needs one."""
    monkeypatch.setattr(parser, "is_torch_bf16_gpu_available", lambda: True)
    for name in ("teacher", "student"):
        shutil.copytree(tiny_root / name, tmp_path / name)
        AutoModelForCausalLM.from_pretrained(tiny_root / name, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    (tmp_path / "data").symlink_to(tiny_root / "data")
    _compare(tmp_path, tmp_path, {"pure_bf16": True}, tolerance=2e-2)


def test_checkpointing_that_offloads_trains_as_in_sft(tiny_root, tmp_path, monkeypatch):
    """`use_unsloth_gc` copies to a device by its name, which is another one here."""
    to = torch.Tensor.to

    def moved(self, *args, **kwargs):
        return to(self, *("cpu" if value == "cuda" else value for value in args), **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", moved)
    _compare(tiny_root, tmp_path, {"use_unsloth_gc": True}, tolerance=2e-4)


def _in(folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """Return the keys with their paths in a folder."""
    return {key: value.format(tmp=folder) if "{tmp}" in str(value) else value for key, value in keys.items()}


def _same(sekd: Path, sft: Path, tolerance: float) -> None:
    assert len(logged(sft, "loss")) == 2
    for key in ("loss", "eval_loss", "eval_accuracy", "num_input_tokens_seen", "learning_rate"):
        assert logged(sekd, key) == pytest.approx(logged(sft, key), abs=tolerance), key
    # What is evaluated after the last step, of which `trainer_state.json` knows nothing.
    ends = [json.loads((folder / "all_results.json").read_text()).get("eval_loss") for folder in (sekd, sft)]
    assert ends[0] == pytest.approx(ends[1], abs=tolerance)
    ours, theirs = weights(sekd), weights(sft)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        # Where a gradient is rounding alone, Adam moves its weight by the learning rate: means, not single ones.
        distance = (ours[name].float() - value.float()).abs().mean()
        assert distance < tolerance / 10, name


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_cannot_act_is_refused_by_its_name(tiny_root, tmp_path, key):
    config = base_config(tiny_root, output_dir=str(tmp_path / "out"), **{key: REFUSED[key]})
    with pytest.raises(SekdError, match=key):
        get_train_args(config)
