"""A teacher behind vLLM's OpenAI-compatible server: top-k by ``prompt_logprobs``, token ids in and out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import httpx
import torch

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.teacher.cache import Format, TopKFormat
from llamafactory_sekd.teacher.cache.record_store import Record
from llamafactory_sekd.teacher.cache.segments import Segment
from llamafactory_sekd.teacher.served.connection import HttpConnection
from llamafactory_sekd.teacher.served.protocol import GarbageError, ServerInfo
from llamafactory_sekd.teacher.vocabulary import SAMPLES


_TOLERANCE = 1e-3  # of a sum of probabilities that travelled as text


class VllmConnection(HttpConnection):
    """A teacher behind vLLM, from 0.11 on, in an environment of its own.

    Args:
        url, patience: see :class:`HttpConnection`.
        vocab_size: ids that the student's tokenizer uses.

    Attributes:
        info: what the server says of its model; hidden states are not among it.
    """

    def __init__(self, url: str, patience: float, vocab_size: int) -> None:
        super().__init__(url, patience)
        models = self.request("GET", "/v1/models", lambda response: response.json())
        version: dict[str, Any] = self.request("GET", "/version", lambda response: response.json(), absent={})
        first = models["data"][0]
        self.info = ServerInfo(
            model=first["id"],
            rows=vocab_size,
            width=1,
            dtype="float32",
            hidden=False,
            max_length=first.get("max_model_len") or 2**20,
            max_k=512,
            teacher={"teacher_weights": f"vllm:{first.get('root') or first['id']}"},
            software={"vllm": version.get("version")},
        )

    def check_tokenizer(self, student: Any) -> None:
        """Check that the server's tokenizer gives the student's ids; `TeacherError` where it does not."""
        for text in SAMPLES:
            asked = {"model": self.info.model, "prompt": text, "add_special_tokens": False}
            theirs = self.request("POST", "/tokenize", _tokens, content=json.dumps(asked).encode())
            ours = student.encode(text, add_special_tokens=False)
            if ours != theirs:
                raise TeacherError(
                    f"the tokenizer of {self.info.model} at {self.url} is not the student's: {text!r} is {ours[:8]} "
                    f"for the student and {theirs[:8]} for the teacher."
                )

    def ask(self, parts: Sequence[Segment], kept: Format, *, together: bool) -> Record:
        """Return the records of some segments, one after the other.

        Raises:
            TeacherError: the server caps k, gives something else than log-probabilities, or stays away.
        """
        if not isinstance(kept, TopKFormat):
            raise TeacherError(f"`teacher_server: {self.url}` is vLLM, which returns top-k alone.")

        asked = {
            "model": self.info.model,
            "prompt": [part.ids.tolist() for part in parts],
            "prompt_logprobs": kept.k,
            "max_tokens": 1,
            "temperature": 0.0,
        }
        choices = self.request("POST", "/v1/completions", _choices, content=json.dumps(asked).encode())
        if len(choices) != len(parts):
            raise TeacherError(f"`teacher_server: {self.url}` answers {len(choices)} of {len(parts)} prompts.")

        rows = [
            row
            for part, choice in zip(parts, choices, strict=True)
            for row in self._rows(part, choice.get("prompt_logprobs"), kept)
        ]
        ids = torch.tensor([[token for token, _ in row] for row in rows]).to(kept.id_type)
        logs = torch.tensor([[value for _, value in row] for row in rows])
        tail = (1.0 - logs.double().exp().sum(-1)).clamp_min(1e-12).log().float()
        return {"ids": ids, "log_probs": logs.to(kept.dtype), "log_tail": tail}

    def head(self) -> dict[str, torch.Tensor]:
        """Refuse: vLLM does not return its head."""
        raise TeacherError(f"`teacher_server: {self.url}` is vLLM, which does not return its LM head.")

    def _rows(self, part: Segment, entries: Any, kept: TopKFormat) -> list[list[tuple[int, float]]]:
        """Return the k largest of each response position.

        The entry of a token is the distribution that it was drawn from, so the position before it predicts it; the
        first token has none.
        """
        ids = part.ids.tolist()
        if not isinstance(entries, list) or len(entries) != len(ids) or entries[0] is not None:
            found = f"{len(entries)} entries" if isinstance(entries, list) else "none"
            raise TeacherError(
                f"`teacher_server: {self.url}` gives {found} of `prompt_logprobs` for {len(ids)} tokens, the first of "
                "which must be null: use vLLM from 0.11 on, and token ids as they are."
            )

        rows = []
        for place in part.rows.nonzero()[0].tolist():
            entry = {int(token): value["logprob"] for token, value in (entries[place + 1] or {}).items()}
            if ids[place + 1] not in entry:
                raise TeacherError(
                    f"`teacher_server: {self.url}` gives log-probabilities that do not belong to their tokens: token "
                    f"{ids[place + 1]} is not in its own entry (an answer that is off by one)."
                )

            known = [(token, value) for token, value in entry.items() if token < kept.vocab_size]
            largest = sorted(known, key=lambda item: -item[1])[: kept.k]
            if len(largest) < kept.k:
                raise TeacherError(
                    f"`teacher_server: {self.url}` gives {len(known)} log-probabilities per token and not {kept.k}: "
                    "start vLLM with `--max-logprobs 512`, or ask for fewer (`teacher_server_topk`, `--k`)."
                )

            mass = math.fsum(math.exp(min(value, 50.0)) for _, value in largest)
            if largest[0][1] > _TOLERANCE or mass > 1.0 + _TOLERANCE:
                raise TeacherError(
                    f"`teacher_server: {self.url}` gives logits and not log-probabilities (their probabilities add up "
                    f"to {mass:.3g}): start vLLM with `--logprobs-mode raw_logprobs`."
                )
            rows.append(largest)

        return rows


def _choices(response: httpx.Response) -> list[dict[str, Any]]:
    try:
        return sorted(response.json()["choices"], key=lambda choice: choice["index"])
    except (ValueError, KeyError, TypeError) as error:
        raise GarbageError("it is no completion") from error


def _tokens(response: httpx.Response) -> list[int]:
    try:
        return response.json()["tokens"]
    except (ValueError, KeyError, TypeError) as error:
        raise GarbageError("it is no list of tokens") from error
