"""A teacher behind vLLM's OpenAI-compatible server: top-k by ``prompt_logprobs``, hidden states by its files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.teacher.cache.formats import DTYPES, Format, HiddenFormat, TopKFormat, written_transform
from llamafactory_sekd.teacher.cache.record_store import Record
from llamafactory_sekd.teacher.cache.segments import Segment
from llamafactory_sekd.teacher.compatibility import SAMPLES
from llamafactory_sekd.teacher.served.connection import HttpConnection
from llamafactory_sekd.teacher.served.protocol import GarbageError, ServerInfo
from llamafactory_sekd.teacher.served.vllm_hidden_states import (
    LastLayers,
    read_hidden_file,
    read_last_layers,
    remove_hidden_file,
)


_TOLERANCE = 1e-3  # of a sum of probabilities that travelled as text
_PROBED = 8  # log-probabilities per token; vLLM returns up to 20 unless it was started with more
_AT_A_TIME = 32  # files hold one sequence each, and so does a request for them


class VllmConnection(HttpConnection):
    """A teacher behind vLLM, from 0.11 on, in an environment of its own.

    Args:
        url, patience: see :class:`HttpConnection`.
        vocab_size: ids that the student's tokenizer uses.

    Attributes:
        info: what the server says of its model; hidden states are among it after :meth:`offer_hidden_states`.
    """

    def __init__(self, url: str, patience: float, vocab_size: int) -> None:
        super().__init__(url, patience)
        models = self.request("GET", "/v1/models", lambda response: response.json())
        version: dict[str, Any] = self.request("GET", "/version", lambda response: response.json(), absent={})
        first = models["data"][0]
        self.root = str(first.get("root") or first["id"])
        self._last_layers: LastLayers | None = None
        self._told_of_files = False
        self.info = ServerInfo(
            model=first["id"],
            rows=vocab_size,
            width=1,
            dtype="float32",
            hidden=False,
            max_length=first.get("max_model_len") or 2**20,
            max_k=512,
            teacher={"teacher_weights": f"vllm:{self.root}"},
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

    def offer_hidden_states(self, student: Any, model: str | None) -> None:
        """Find out whether the server returns hidden states from which its own log-probabilities follow.

        Args:
            student: the student's tokenizer.
            model: folder or hub id of the served model, of which the final norm and the head are read; None for what
                the server calls it.

        Raises:
            TeacherError: it returns none, or others.
        """
        ids = [token for text in SAMPLES[:3] for token in student.encode(text, add_special_tokens=False)]
        part = Segment(np.asarray(ids, dtype=np.int32), np.arange(len(ids)) < len(ids) - 1, None)
        [choice], hidden = self._hidden(part, prompt_logprobs=_PROBED)
        dtype = next((name for name, known in DTYPES.items() if known == hidden.dtype), None)
        if dtype is None:
            raise TeacherError(f"`teacher_server: {self.url}` returns hidden states in {hidden.dtype}: use bfloat16.")
        layers = read_last_layers(model or self.root, hidden.dtype)
        rows, width = layers.head["weight"].shape
        if hidden.shape[1] != width:
            raise TeacherError(
                f"`teacher_server: {self.url}` returns hidden states of width {hidden.shape[1]}, and the LM head of "
                f"{model or self.root} has {width}: name the served model as `teacher_model`."
            )
        told = self._rows(part, choice.get("prompt_logprobs"), TopKFormat(_PROBED, torch.float32, rows))
        log_probs, largest = layers.log_probs(layers.norm(hidden[torch.from_numpy(part.rows)]))
        tokens = torch.tensor([[token for token, _ in row] for row in told])
        theirs = torch.tensor([[value for _, value in row] for row in told])
        difference = float((log_probs.gather(-1, tokens) - theirs).abs().mean())
        # A logit is rounded to its type; what is summed up before it, and the text it travelled as, add a little.
        allowed = _TOLERANCE + torch.finfo(hidden.dtype).eps * (1.0 + largest)
        if not difference <= allowed:
            raise TeacherError(
                f"`teacher_server: {self.url}` returns hidden states whose log-probabilities, by the final norm and "
                f"LM head of {model or self.root}, differ by {difference:.3g} from its own ({dtype} explains "
                f"{allowed:.2g}): let the last of `eagle_aux_hidden_state_layer_ids` be the number of layers, and "
                "name the served model as `teacher_model`."
            )
        self._last_layers = layers
        size = sum(tensor.nbytes for tensor in layers.head.values())
        self.info = replace(
            self.info,
            rows=rows,
            width=width,
            dtype=dtype,
            hidden=True,
            head={"bytes": size},
            transform=written_transform(layers.transform),
        )

    def ask(self, parts: Sequence[Segment], kept: Format, *, together: bool) -> Record:
        """Return the records of some segments, one after the other.

        Raises:
            TeacherError: the server caps k, gives something else than log-probabilities, or stays away.
        """
        if isinstance(kept, HiddenFormat):
            with ThreadPoolExecutor(min(len(parts), _AT_A_TIME)) as pool:
                return {"hidden": torch.cat(list(pool.map(lambda part: self._normed(part, kept), parts)))}

        assert isinstance(kept, TopKFormat)
        choices, _ = self._complete([part.ids.tolist() for part in parts], prompt_logprobs=kept.k)
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
        """Return the head's ``weight`` and, where it has one, ``bias``."""
        return self._layers.head

    @property
    def _layers(self) -> LastLayers:
        if self._last_layers is None:
            raise TeacherError(f"`teacher_server: {self.url}` has not been asked whether it returns hidden states.")
        return self._last_layers

    @torch.no_grad()
    def _normed(self, part: Segment, kept: HiddenFormat) -> torch.Tensor:
        """Return what the head reads at the response positions, ``[tokens, width]``."""
        _, hidden = self._hidden(part)
        info = self.info
        if hidden.shape[1] != info.width or hidden.dtype != DTYPES[info.dtype]:
            raise TeacherError(
                f"`teacher_server: {self.url}` returns hidden states {list(hidden.shape)} in {hidden.dtype} and not "
                f"of width {info.width} in {info.dtype} as before: it was started with another model."
            )
        return self._layers.norm(hidden[torch.from_numpy(part.rows)]).to(kept.dtype)

    def _hidden(self, part: Segment, **settings: Any) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """Return the completion of a sequence and its hidden states before the final norm, ``[length, width]``."""
        ids = part.ids.tolist()
        # One sequence a request: the answer names the file of its first sequence alone.
        choices, told = self._complete([ids], **settings)
        name = (told or {}).get("hidden_states_path")
        if not name:
            raise TeacherError(
                f"`teacher_server: {self.url}` is vLLM and returns no hidden states of {self.info.model}: start it "
                "with `extract_hidden_states` (docs/teacher.md), or ask for top-k (`--format topk`, "
                "`teacher_server_topk: 64`)."
            )
        path = Path(name)
        hidden = read_hidden_file(path, ids, self.url, self.patience)
        try:
            remove_hidden_file(path)
        except OSError as error:
            if not self._told_of_files:
                self._told_of_files = True
                self.say(f"{path} and others like it stay where vLLM wrote them ({error}): remove them afterwards.")
        return choices, hidden

    def _complete(self, prompts: list[list[int]], **settings: Any) -> tuple[list[dict[str, Any]], Any]:
        """Return the choices of a completion in order, and its ``kv_transfer_params``."""
        asked = {"model": self.info.model, "prompt": prompts, "max_tokens": 1, "temperature": 0.0, **settings}
        choices, told = self.request("POST", "/v1/completions", _completion, content=json.dumps(asked).encode())
        if len(choices) != len(prompts):
            raise TeacherError(f"`teacher_server: {self.url}` answers {len(choices)} of {len(prompts)} prompts.")
        return choices, told

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


def _completion(response: httpx.Response) -> tuple[list[dict[str, Any]], Any]:
    try:
        content = response.json()
        return sorted(content["choices"], key=lambda choice: choice["index"]), content.get("kv_transfer_params")
    except (ValueError, KeyError, TypeError) as error:
        raise GarbageError("it is no completion") from error


def _tokens(response: httpx.Response) -> list[int]:
    try:
        return response.json()["tokens"]
    except (ValueError, KeyError, TypeError) as error:
        raise GarbageError("it is no list of tokens") from error
