"""The command line ``sekd serve``: the host's model loading behind HTTP."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer


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
    quantization_bit: Annotated[int | None, typer.Option(help="4 or 8, with bitsandbytes (CUDA only).")] = None,
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

    import torch
    import uvicorn

    from llamafactory_sekd.errors import ArgumentError, one_line
    from llamafactory_sekd.host.serving import make_service
    from llamafactory_sekd.teacher.cache import DTYPES
    from llamafactory_sekd.teacher.served import TOKEN
    from llamafactory_sekd.teacher.served.connection import is_loopback

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

    if quantization_bit is not None and not torch.cuda.is_available():
        raise ArgumentError(
            f"`--quantization-bit {quantization_bit}` needs a CUDA device, and none is here: remove it to serve the "
            "teacher unquantized."
        )

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
        _listen(service, listening, line, uvicorn)


def _listen(service: FastAPI, listening: Any, line: str, uvicorn: Any) -> None:
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    print(f"{line} at http://{shown}:{port} (Ctrl+C ends it)", flush=True)
    config = uvicorn.Config(service, log_level="warning", access_log=False, timeout_graceful_shutdown=10)
    uvicorn.Server(config).run(sockets=[listening])
