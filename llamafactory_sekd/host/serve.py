"""The command line ``sekd serve``: a teacher that the host loads, behind the service of ``teacher.served``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamafactory_sekd.config import read_overrides
from llamafactory_sekd.errors import ArgumentError, TeacherError, one_line
from llamafactory_sekd.fingerprints import computing_software


if TYPE_CHECKING:
    from fastapi import FastAPI

app = typer.Typer(add_completion=False)


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="The teacher: a folder or hub id.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of LLaMA-Factory's model arguments.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Its adapters, separated by commas.")] = None,
    quantization_bit: Annotated[int | None, typer.Option(help="4 or 8, with bitsandbytes.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: the model's, where the device has it.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 admits other machines and needs SEKD_SERVER_TOKEN.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any that is free.", min=0, max=65535)] = 8001,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens of a forward pass, padding included; less takes less memory.", min=1)
    ] = 16384,
    max_request: Annotated[int, typer.Option(help="Largest request, in MiB.", min=1)] = 64,
) -> None:
    """Serve a teacher to training runs and to `sekd cache --server` on other machines."""
    import socket

    from llamafactory_sekd.host.run_arguments import check_quantizing
    from llamafactory_sekd.teacher.cache.formats import DTYPES
    from llamafactory_sekd.teacher.served.connection import TOKEN, is_loopback

    token = os.environ.get(TOKEN) or None
    if not is_loopback(host) and token is None:
        raise ArgumentError(
            f"`--host {host}` lets other machines ask this one: set the environment variable {TOKEN} to a secret, "
            "here and for the runs that ask."
        )

    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"`--dtype {dtype}` cannot be used: choose one of {', '.join(DTYPES)}.")

    if quantization_bit not in (None, 4, 8):
        raise ArgumentError(f"`--quantization-bit {quantization_bit}` cannot be used: choose 4 or 8.")

    method = read_overrides(overrides or []).get("quantization_method", "bnb")
    check_quantizing(f"--quantization-bit {quantization_bit}", quantization_bit, method)

    # Taken before the model is loaded, so that a port in use shows at once.
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ArgumentError(
            f"`--host {host} --port {port}` cannot be listened on ({one_line(str(error.strerror or error))}): choose "
            "another one."
        ) from error

    with listening:
        service, line = make_service(
            model,
            adapters=adapter,
            quantization_bit=quantization_bit,
            dtype=dtype,
            overrides=overrides or [],
            batch_tokens=batch_tokens,
            max_bytes=max_request * 2**20,
            token=token,
        )
        _listen(service, listening, line)


def make_service(
    model: str,
    *,
    adapters: str | None,
    quantization_bit: int | None,
    dtype: str | None,
    overrides: Sequence[str],
    batch_tokens: int,
    max_bytes: int,
    token: str | None,
) -> tuple[FastAPI, str]:
    """Load a teacher and return its service, and a line that says what it is.

    Args:
        model, adapters, quantization_bit, dtype: the teacher; see ``sekd serve --help``.
        overrides: ``key=value`` of the host's model arguments.
        batch_tokens: of a forward pass, padding included.
        max_bytes: of a request.
        token: that requests must bring, None for none.

    Raises:
        ArgumentError: an override is unknown.
        TeacherError: the teacher cannot be loaded.
    """
    import torch
    from accelerate import Accelerator
    from llamafactory.extras.misc import infer_optim_dtype
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.model import load_config, load_model, load_tokenizer
    from safetensors import SafetensorError

    from llamafactory_sekd.host.cached_teacher import teacher_fields
    from llamafactory_sekd.teacher import Teacher, check_teacher_files
    from llamafactory_sekd.teacher.cache.formats import DTYPES, TOPK_RANGE, written_transform
    from llamafactory_sekd.teacher.compatibility import check_adapter_files, check_is_causal
    from llamafactory_sekd.teacher.served.protocol import ServerInfo, answer_of, describe
    from llamafactory_sekd.teacher.served.service import Worker, make_app

    check_teacher_files(model)
    check_adapter_files(adapters.split(",") if adapters else [])

    model_args = _model_arguments(model, adapters, quantization_bit, overrides)
    try:
        config = load_config(model_args)
        check_is_causal(model, config)
        model_args.compute_dtype = DTYPES[dtype] if dtype else infer_optim_dtype(getattr(config, "torch_dtype", None))
        tokenizer = load_tokenizer(model_args)["tokenizer"]
        loaded = load_model(tokenizer, model_args, FinetuningArguments(), is_trainable=False)
    except (OSError, SafetensorError) as error:
        raise TeacherError(
            f"`--model {model}` cannot be loaded ({one_line(str(error.__cause__ or error))})."
        ) from error

    # As a run with `bf16: true` or `fp16: true` computes its teacher.
    autocast = None if dtype in (None, "float32") else DTYPES[dtype]
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(autocast, "no")  # type: ignore[arg-type]
    on_cpu = not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="no" if on_cpu and precision == "fp16" else precision, cpu=on_cpu)
    teacher = Teacher(loaded, accelerator)
    device = accelerator.device
    transform = teacher.logit_transform({"input_ids": torch.zeros(1, 8, dtype=torch.int64, device=device)})
    is_exact = transform is not None
    with teacher.head_parameters() as (weight, bias):
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        head, checksum = answer_of({name: values.detach() for name, values in tensors.items()})
        rows, width = weight.shape
        product_type = autocast or weight.dtype

    text_config = config.get_text_config()
    info = ServerInfo(
        model=model,
        rows=rows,
        width=width,
        dtype=next((name for name, known in DTYPES.items() if known == product_type), "float32"),
        hidden=is_exact,
        max_length=min(batch_tokens, getattr(text_config, "max_position_embeddings", None) or batch_tokens),
        max_k=min(TOPK_RANGE[1], rows - 1),
        teacher=teacher_fields(model, adapters, quantization_bit, model_args),
        software=computing_software(),
        head={"bytes": len(head), "xxh3": checksum} if is_exact else None,
        transform=None if transform is None else written_transform(transform),
    )
    service = make_app(
        Worker(teacher, device, batch_tokens),
        info,
        head=head if is_exact else None,
        tokenizer=describe(tokenizer),
        token=token,
        max_bytes=max_bytes,
    )
    kind = "hidden states and top-k" if is_exact else "top-k alone"
    return service, f"Serving {model} ({info.dtype}, {kind}, fingerprint {str(info.fingerprint)[:12]})"


def _model_arguments(model: str, adapters: str | None, quantization_bit: int | None, overrides: Sequence[str]) -> Any:
    from llamafactory.extras.misc import get_current_device
    from llamafactory.hparams import ModelArguments

    given = read_overrides(overrides)
    known = {str(item.name) for item in fields(ModelArguments) if item.init}
    unknown = next((str(key) for key in given if str(key) not in known), None)
    if unknown is not None:
        raise ArgumentError(f"`{unknown}: {given[unknown]}` is no model argument of LLaMA-Factory.")

    keys = {"adapter_name_or_path": adapters, "quantization_bit": quantization_bit, **given}
    model_args = ModelArguments(model_name_or_path=model, **keys)
    model_args.device_map = {"": get_current_device()}
    return model_args


def _listen(service: FastAPI, listening: Any, line: str) -> None:
    import uvicorn

    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    print(f"{line} at http://{shown}:{port} (Ctrl+C ends it)", flush=True)
    config = uvicorn.Config(service, log_level="warning", access_log=False, timeout_graceful_shutdown=10)
    uvicorn.Server(config).run(sockets=[listening])
