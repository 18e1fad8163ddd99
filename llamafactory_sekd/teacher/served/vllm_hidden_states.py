"""Hidden states of vLLM's `extract_hidden_states`: its files, and the last layers, which they are taken before."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from llamafactory_sekd.errors import TeacherError, one_line
from llamafactory_sekd.lm_head import is_plain_product, logit_transform
from llamafactory_sekd.objectives import LogitTransform
from llamafactory_sekd.teacher.source import every_logit, product


# A file that nobody is writing is there after so many seconds, or never.
_UNTIL_A_FILE_APPEARS = 60.0
_LONGEST_PAUSE = 0.25


@dataclass(frozen=True)
class LastLayers:
    """What a model does after its last block: the final norm, the head, and what it makes of the head's products.

    Attributes:
        norm: takes and returns ``[tokens, width]``.
        head: ``weight`` ``[vocab, width]`` and, where it has one, ``bias`` ``[vocab]``.
        transform: of the products.
    """

    norm: nn.Module
    head: dict[str, torch.Tensor]
    transform: LogitTransform

    @torch.no_grad()
    def log_probs(self, hidden: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return log-probabilities ``[tokens, vocab]``, float32, and the largest size of a logit.

        Args:
            hidden: ``[tokens, width]``, after the norm.
        """
        source = product(hidden, self.head["weight"], self.head.get("bias"), None, self.transform)
        logits = every_logit(source).float()
        return logits.log_softmax(-1), float(logits.abs().max())


def read_last_layers(model: str, dtype: torch.dtype) -> LastLayers:
    """Read the final norm and the head of a model, and nothing else of its weights.

    Args:
        model: a folder, or a hub id.
        dtype: that the server computes in.

    Raises:
        TeacherError: there is no such model, or its last layers are not a norm and a product.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            skeleton: Any = AutoModelForCausalLM.from_config(config)
        norm, head = _last_norm(skeleton), skeleton.get_output_embeddings()
        transform = _transform_of(skeleton, head) if norm is not None and is_plain_product(head) else None
        if norm is None or transform is None:
            raise TeacherError(
                f"{model} ({config.model_type}) does not end with a norm and an LM head that can be applied here: ask "
                "for top-k (`--format topk`, `teacher_server_topk`)."
            )
        names = {part: name for name, part in skeleton.named_modules()}
        tied = names[skeleton.get_input_embeddings()] if config.get_text_config().tie_word_embeddings else None
        files = _WeightFiles(model)
        of_norm = files.read(names[norm], norm.state_dict(), dtype)
        of_head = files.read(tied if tied and names[head] not in files else names[head], head.state_dict(), dtype)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, TeacherError):
            raise
        raise TeacherError(
            f"the final norm and LM head of {model} cannot be read on this machine ({one_line(str(error))}): name the "
            "served model's folder as `teacher_model` for `sekd cache`, put it where the server has it, or ask for "
            "top-k (`--format topk`, `teacher_server_topk`)."
        ) from error

    norm.load_state_dict(of_norm, assign=True)
    return LastLayers(norm.eval(), of_head, transform)


def read_hidden_file(path: Path, ids: list[int], url: str, patience: float) -> torch.Tensor:
    """Wait for a file that vLLM writes, and return the hidden states of its last layer, ``[length, width]``.

    vLLM locks ``PATH.lock`` while it writes, where its version and settings say so.

    Args:
        path: as the server named it.
        ids: that were asked about.
        url: of the server, for messages.
        patience: seconds that writing may take.

    Raises:
        TeacherError: the file does not come, or is of something else.
    """
    started, pause, content, is_written_to = time.monotonic(), 0.005, None, False
    while content is None:
        try:
            content, is_written_to = _content(path), False
        except BlockingIOError:
            is_written_to = True
        except (FileNotFoundError, SafetensorError):
            is_written_to = False
        except OSError as error:
            raise TeacherError(
                f"`teacher_server: {url}` has written {path}, which cannot be read here ({one_line(str(error))}): "
                "give this user the right to read it."
            ) from error

        if time.monotonic() - started > (patience if is_written_to else min(patience, _UNTIL_A_FILE_APPEARS)):
            raise TeacherError(
                f"`teacher_server: {url}` names {path} for its hidden states, and no complete file has been there for "
                f"{time.monotonic() - started:.0f} s: let vLLM's `shared_storage_path` be a folder that this machine "
                "sees under the same name."
            )
        if content is None:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    found, hidden = content.get("token_ids"), content.get("hidden_states")
    if found is None or hidden is None or found.tolist() != ids:
        raise TeacherError(
            f"`teacher_server: {url}` names {path}, which holds the hidden states of other tokens than the {len(ids)} "
            "that were asked about: let no other process write there."
        )
    if hidden.dim() != 3 or len(hidden) != len(ids):
        raise TeacherError(
            f"`teacher_server: {url}` gives hidden states {list(hidden.shape)} for {len(ids)} tokens and not "
            f"[{len(ids)}, layers, width]: start vLLM with `--no-enable-chunked-prefill`, or use a newer version."
        )
    return hidden[:, -1]


def remove_hidden_file(path: Path) -> None:
    """Remove a file that was read, and its lock: vLLM leaves both to its clients."""
    for written in (path, _lock_of(path)):
        written.unlink(missing_ok=True)


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _content(path: Path) -> dict[str, torch.Tensor]:
    """Read a file; :class:`BlockingIOError` while it is written to."""
    import fcntl  # which only Unix has, like vLLM

    try:
        with _lock_of(path).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return load_file(path)
    except FileNotFoundError:
        return load_file(path)  # without locks


def _last_norm(model: Any) -> nn.Module | None:
    """Return the last norm among the parts of the model without its head; the probe shows whether it is the one."""
    norms = [part for part in model.base_model.children() if "norm" in type(part).__name__.lower()]
    return norms[-1] if norms else None


def _transform_of(model: Any, head: Any) -> LogitTransform | None:
    """Find what a model without weights does to the products of its head; None for what cannot be found out."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    width = head.weight.shape[1]
    base = model.base_model
    base.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=torch.zeros(1, 1, width))
    try:
        return logit_transform(model, head, {"input_ids": torch.zeros(1, 1, dtype=torch.int64)})
    except (AttributeError, KeyError, TypeError, RuntimeError, NotImplementedError):
        return None
    finally:
        del base.forward


class _WeightFiles:
    """The safetensors files of a model, of which single tensors are read."""

    def __init__(self, model: str) -> None:
        from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

        self.model = model
        index = self._file(SAFE_WEIGHTS_INDEX_NAME)
        if index is not None:
            self.file_of: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            return
        weights = self._file(SAFE_WEIGHTS_NAME)
        if weights is None:
            raise FileNotFoundError(f"no {SAFE_WEIGHTS_NAME}")
        with safe_open(weights, "pt") as opened:
            self.file_of = dict.fromkeys(opened.keys(), SAFE_WEIGHTS_NAME)

    def __contains__(self, module: str) -> bool:
        return f"{module}.weight" in self.file_of

    def read(self, module: str, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the tensors of a module by their names in it."""
        found = {}
        for name in names:
            with safe_open(self._file(self.file_of[f"{module}.{name}"]), "pt") as opened:
                found[name] = opened.get_tensor(f"{module}.{name}").to(dtype)

        return found

    def _file(self, name: str) -> str | None:
        from transformers.utils import cached_file

        return cached_file(self.model, name, _raise_exceptions_for_missing_entries=False)
