"""A tiny real model behind HTTP that answers in the format of vLLM's OpenAI-compatible server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@contextmanager
def vllm_stub(folder: Path, *, max_logprobs: int = 20, fault: str = "") -> Iterator[str]:
    """Serve a model; `fault` is what goes wrong in its answers."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def entries(ids: list[int], k: int) -> list[Any]:
        with torch.no_grad():
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
            elif asked["prompt_logprobs"] > max_logprobs:
                text = (
                    f"Requested prompt logprobs of {asked['prompt_logprobs']}, which is greater than max allowed: 20"
                )
                self.answer(400, {"error": {"message": text, "type": "BadRequestError"}})
            else:
                choices = [
                    {"index": n, "text": "", "prompt_logprobs": entries(ids, asked["prompt_logprobs"])}
                    for n, ids in enumerate(asked["prompt"])
                ]
                self.answer(200, {"choices": choices})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
