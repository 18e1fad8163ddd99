"""A tiny real model behind HTTP that answers in the format of vLLM's OpenAI-compatible server."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@contextmanager
def vllm_stub(
    folder: Path,
    *,
    max_logprobs: int = 20,
    fault: str = "",
    files: Path | None = None,
    dtype: torch.dtype = torch.float32,
    together: int = 1,
) -> Iterator[str]:
    """Serve a model.

    `fault` is what goes wrong in its answers, `files` where it writes hidden states; completions are answered only
    when `together` of them wait.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    company = threading.Barrier(together, timeout=60)
    writers: list[threading.Thread] = []
    computing = threading.Lock()  # what a hook sees must be of one sequence

    def hidden_states(ids: list[int]) -> torch.Tensor:
        """[tokens, layers, width] before the final norm, of the embeddings and of the last layer."""
        seen: list[torch.Tensor] = []
        with computing, torch.no_grad():
            handle = model.base_model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            first = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[0]
            handle.remove()
        layers = [first[0], seen[0][0]]
        return torch.stack(layers[::-1] if fault == "another layer" else layers, dim=1)

    def write(path: Path, ids: list[int], lock: Any) -> None:
        try:
            hidden, told = hidden_states(ids), torch.tensor(ids)
            if fault == "rows off by one":
                hidden = hidden.roll(1, dims=0)
            if fault == "missing rows":
                hidden = hidden[:-1].contiguous()
            if fault == "other tokens":
                told = told.flip(0)
            time.sleep(0.02)  # the answer is on its way before the file is there
            if fault != "no file":
                save_file({"hidden_states": hidden, "token_ids": told}, path)
        finally:
            if lock is not None:
                lock.close()  # which lets readers in

    def file_of(ids: list[int]) -> dict[str, str] | None:
        if files is None:
            return None
        path = files / f"cmpl-{threading.get_ident()}-{time.monotonic_ns()}.safetensors"
        lock = None
        if fault != "no locks":
            lock = open(f"{path}.lock", "wb")  # noqa: SIM115  # the writer closes it
            fcntl.flock(lock, fcntl.LOCK_EX)
        writers.append(threading.Thread(target=write, args=(path, ids, lock)))
        writers[-1].start()
        return {"hidden_states_path": str(path)}

    def entries(ids: list[int], k: int) -> list[Any]:
        with computing, torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].float()
        logs = logits if fault == "logits" else logits.log_softmax(-1)
        found: list[Any] = [] if fault == "no first" else [None]
        for place, token in enumerate(ids[1:]):
            row = logs[place + (1 if fault == "off by one" else 0)]
            top = row.topk(8 if fault == "capped" else k)
            shown = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            if fault != "off by one":
                shown[token] = row[token].item()
            found.append({str(n): {"logprob": v, "rank": 1, "decoded_token": "?"} for n, v in shown.items()})
        return found

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

        def answer(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            known = {
                "/v1/models": {"data": [{"id": "tiny", "root": str(folder), "max_model_len": 2048}]},
                "/version": {"version": "0.11.0"},
            }
            self.answer(200 if self.path in known else 404, known.get(self.path, {"detail": "Not Found"}))

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                self.answer(200, {"tokens": tokenizer.encode(asked["prompt"], add_special_tokens=False)})
            elif asked.get("prompt_logprobs", 0) > max_logprobs:
                text = (
                    f"Requested prompt logprobs of {asked['prompt_logprobs']}, which is greater than max allowed: 20"
                )
                self.answer(400, {"error": {"message": text, "type": "BadRequestError"}})
            else:
                company.wait()
                k = asked.get("prompt_logprobs")
                choices = [
                    {"index": n, "text": "", "prompt_logprobs": None if k is None else entries(ids, k)}
                    for n, ids in enumerate(asked["prompt"])
                ]
                # As vLLM does: the file of the first prompt alone, whatever their number.
                self.answer(200, {"choices": choices, "kv_transfer_params": file_of(asked["prompt"][0])})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        for writer in writers:
            writer.join()
