"""Whose text a step trains on: the student's own samples in place of references (on-policy distillation).

Distillation on fixed references trains the student on prefixes that it never produces itself. On-policy distillation
(GKD, arXiv 2306.13649) replaces the response of a share of the examples by the present student's own sample and lets
the teacher judge it: λ is 1 there, because a sample is no ground truth.

The replacement happens where the trainer has collected the micro-batches of a step and has not counted their tokens
yet. So accumulation, ranks and the division by the token count stay those of any other step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig, LogitsProcessorList

from llamafactory_sekd.errors import ArgumentError, DataError
from llamafactory_sekd.objectives import IGNORE_INDEX
from llamafactory_sekd.teacher.source import TEACHER_NUMBER
from llamafactory_sekd.trainer.own_sample_logs import OwnSampleLog, OwnText
from llamafactory_sekd.trainer.sampling import InverseTransform, RowDraws, Sampling, as_generator, uniforms_of


OWN = "own_sample"  # int64 [batch], in a batch: which own sample of the step a row holds, -1 for a reference
_TEXT_KEYS = {"input_ids", "attention_mask", "labels", TEACHER_NUMBER}
_ROUND_TO = 8  # the host pads training batches to a multiple of 8
# Prompt and new tokens that are decoded at a time; bounds the key-value cache, as `batch_tokens` does in evaluation.
TOKENS_AT_A_TIME = 16384


# Decodes so that rows which have ended leave. In: the model, prompts, what chooses each token (None: the most likely),
# and the longest sample. Out: groups of (place, new tokens), or None where the model needs `generate`; and whether
# prompts of different lengths may share a batch there.
_Groups = Iterator[list[tuple[int, list[int]]]]
Search = Callable[[Any, Sequence[list[int]], RowDraws | None, int], tuple[_Groups | None, bool]]


@dataclass
class _Example:
    """An example whose response is replaced.

    Attributes:
        batch, row: its place among the micro-batches of the step.
        prompt: the tokens before the response, which are those of inference with the same template.
        reference: the response of the data.
        name: the hash of seed, epoch and tokens, in hexadecimal digits.
    """

    batch: int
    row: int
    prompt: list[int]
    reference: list[int]
    name: str

    @property
    def seed(self) -> int:
        """The seed of its sample."""
        return int(self.name[16:], 16) >> 1


class OwnSamples:
    """Replaces responses in the micro-batches of a step by the student's own samples.

    Args:
        share: the share of the examples, from 0 to 1.
        every: so many steps, which have the same micro-batches, use the samples that the first of them draws.
        drop_truncated: leave samples that hit the limit out of the loss.
        sampling: how to sample.
        cutoff_len: the longest sequence of prompt and sample.
        seed: decides, with epoch and example, which examples are replaced and what is drawn.
        accelerator: the trainer's.
        log: takes note of the samples of each step.
        search: decodes faster than `generate` does; None, and sharded models, take `generate`.
    """

    def __init__(
        self,
        share: float,
        every: int,
        drop_truncated: bool,
        sampling: Sampling,
        cutoff_len: int,
        seed: int,
        accelerator: Any,
        log: OwnSampleLog,
        search: Search | None = None,
    ) -> None:
        self.share = share
        self.every = every
        self.drop_truncated = drop_truncated
        self.sampling = sampling
        self.cutoff_len = cutoff_len
        self.seed = seed
        self.accelerator = accelerator
        self.log = log
        self.search = search
        self._read: torch.Tensor | None = None  # of the step that has drawn: steps that share it share its samples
        self._chosen: list[_Example] = []
        self._samples: dict[str, list[int]] = {}
        self._restored: dict[str, list[int]] = {}
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is not None and getattr(plugin, "fsdp_version", 1) == 1:
            raise ArgumentError(
                "`kd_on_policy` cannot generate under FSDP 1, which flattens the weights that generation reads: set "
                "`fsdp_version: 2` in the configuration of accelerate, or use DeepSpeed."
            )

    def replace(self, model: Any, batches: list[dict[str, Any]], epoch: int) -> None:
        """Replace the chosen responses of the micro-batches of a step, in place; all ranks call this together.

        Args:
            model: the student, unwrapped.
            batches: the micro-batches. With the tensors of the step before they keep its samples.
            epoch: the present one.

        Raises:
            DataError: a row holds more than one response, or a batch more than text.
        """
        seconds = None
        if batches[-1]["input_ids"] is not self._read:
            started = time.perf_counter()
            self._read = batches[-1]["input_ids"]
            self._chosen = [e for number, batch in enumerate(batches) for e in self._choose(batch, number, epoch)]
            self._draw(model)
            seconds = time.perf_counter() - started

        texts = [OwnText(e.prompt, e.reference, self._samples[e.name]) for e in self._chosen]
        for number, batch in enumerate(batches):
            places = [place for place, example in enumerate(self._chosen) if example.batch == number]
            own = {self._chosen[place].row: (place, texts[place]) for place in places}
            batches[number] = self._with_samples(batch, own)
        self.log.note(batches, texts, seconds)

    def state(self, step: int) -> dict[str, list[int]]:
        """Return the samples of all ranks, by example, that are needed after ``step`` steps; all ranks call this."""
        return {} if step % self.every == 0 else dict(gather_object(list(self._samples.items())))

    def restore(self, samples: dict[str, list[int]]) -> None:
        """Take over what :meth:`state` returned when the checkpoint was written."""
        self._restored = samples

    def _draw(self, model: Any) -> None:
        """Draw for the chosen examples; a checkpoint's samples, from weights that are gone, are taken once instead."""
        known, self._restored = self._restored, {}
        named = {example.name: example for example in self._chosen}
        missing = [example for name, example in named.items() if name not in known]
        made = self._generate(model, missing) if missing or self._is_sharded() else []
        self._samples = {name: known[name] for name in named if name in known}
        self._samples |= {example.name: sample for example, sample in zip(missing, made, strict=True)}

    def _choose(self, batch: dict[str, Any], number: int, epoch: int) -> Iterator[_Example]:
        """Yield the examples of a micro-batch whose response is replaced.

        A hash of seed, epoch and tokens decides, never a coin per step: the choice is the same after a restart, on
        any number of ranks, and however the micro-batches are cut.
        """
        if others := sorted(set(batch) - _TEXT_KEYS):
            raise DataError(
                f"`kd_on_policy` replaces responses in batches of plain text, and these have `{others[0]}` as well: "
                "set `kd_on_policy: 0`, or leave out what makes it (packing, images)."
            )

        for row, (ids, mask, labels) in enumerate(
            zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist(), strict=True)
        ):
            length = sum(mask)
            labeled = [place for place in range(length) if labels[place] != IGNORE_INDEX]
            if not labeled:  # repeated to fill up the epoch's last batch, or cut away by `cutoff_len`
                continue
            first, last = labeled[0], labeled[-1]
            if first == 0 or len(labeled) != last - first + 1:
                raise DataError(
                    "`kd_on_policy` needs one response behind one prompt, and this example has several, or none "
                    f"without a label: {self.log.decode(ids[:length])[:200]!r}. Set `mask_history: true` and "
                    "`train_on_prompt: false`, or `kd_on_policy: 0`."
                )
            digest = blake2b(f"{self.seed}:{epoch}:{ids[:length]}".encode(), digest_size=16).digest()
            if int.from_bytes(digest[:8], "big") < self.share * 2**64:
                yield _Example(number, row, ids[:first], ids[first : last + 1], digest.hex())

    def _generate(self, model: Any, examples: Sequence[_Example]) -> list[list[int]]:
        """Return a sample for each example, up to and including its stop token."""
        sampling = self.sampling
        limits = [max(1, min(sampling.max_new_tokens, self.cutoff_len - len(example.prompt))) for example in examples]
        # Rows of like length share a batch, so that little is padded; the longest come first, so that memory that
        # does not suffice shows in the first batch.
        order = sorted(range(len(examples)), key=lambda place: -len(examples[place].prompt))
        batches: list[list[int]] = []
        while order:
            width = len(examples[order[0]].prompt) + max(limits[place] for place in order)
            size = max(1, TOKENS_AT_A_TIME // width)
            batches.append(order[:size])
            order = order[size:]

        samples: list[list[int]] = [[] for _ in examples]
        sharded = self._is_sharded()
        if self.search is not None and not sharded:
            with as_generator(model):
                found, padded = self._search(model, examples, max(limits, default=1))
            if found is not None:
                return [self._until_stop(row[:limit]) for row, limit in zip(found, limits, strict=True)]
            if not padded:
                batches = [[place] for batch in batches for place in batch]

        rounds = self._most_of_all_ranks(len(batches)) if sharded else len(batches)
        with as_generator(model):
            for number in range(rounds):
                # Sharded weights are gathered by all ranks together, so a rank without rows computes along.
                batch = batches[number] if number < len(batches) else []
                prompts = [examples[place].prompt for place in batch] or [[sampling.pad_id]]
                longest = max((limits[place] for place in batch), default=1)
                seeds = [examples[place].seed for place in batch] or [0]
                rows = self._generate_batch(model, prompts, seeds, longest, sharded)
                for place, row in zip(batch, rows, strict=False):
                    samples[place] = self._until_stop(row[: limits[place]])
        return samples

    def _search(self, model: Any, examples: Sequence[_Example], longest: int) -> tuple[list[list[int]] | None, bool]:
        assert self.search is not None
        draws = RowDraws(self.sampling, [e.seed for e in examples]) if self.sampling.do_sample else None
        groups, padded = self.search(model, [example.prompt for example in examples], draws, longest)
        if groups is None:
            return None, padded
        rows = dict(entry for group in groups for entry in group)
        return [rows[place] for place in range(len(examples))], padded

    def _generate_batch(
        self, model: Any, prompts: list[list[int]], seeds: list[int], new_tokens: int, sharded: bool
    ) -> list[list[int]]:
        sampling, device = self.sampling, self.accelerator.device
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), sampling.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # on the left: a sample continues its prompt
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1

        processors = LogitsProcessorList()
        if sampling.do_sample:
            uniforms = torch.stack([uniforms_of(seed, new_tokens) for seed in seeds])
            processors = sampling.warpers()
            processors.append(InverseTransform(uniforms.to(device), width))

        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(
                do_sample=False,  # the processor has drawn already
                max_new_tokens=new_tokens,
                eos_token_id=list(sampling.stop_ids),
                pad_token_id=sampling.pad_id,
                use_cache=True,
            ),
            logits_processor=processors,
            synced_gpus=sharded,
        )
        return output[:, width:].tolist()

    def _with_samples(self, batch: dict[str, Any], own: dict[int, tuple[int, OwnText]]) -> dict[str, Any]:
        """Return the micro-batch with its samples: padded on the right again, as the host pads in training."""
        ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
        numbers = torch.full((len(ids),), -1, device=ids.device)
        if not own:
            return {**batch, OWN: numbers}

        lengths = mask.sum(-1).tolist()
        for row, (_, text) in own.items():
            lengths[row] = len(text.prompt) + len(text.sample)
        width = -(-max(lengths) // _ROUND_TO) * _ROUND_TO
        shape = (len(ids), width)
        new_ids = ids.new_full(shape, self.sampling.pad_id)
        new_mask = mask.new_zeros(shape)
        new_labels = labels.new_full(shape, IGNORE_INDEX)
        for row, length in enumerate(lengths):
            new_mask[row, :length] = 1
            if row not in own:
                new_ids[row, :length] = ids[row, :length]
                new_labels[row, :length] = labels[row, :length]
                continue
            numbers[row], text = own[row]
            new_ids[row, :length] = ids.new_tensor(text.prompt + text.sample)
            if not (self.drop_truncated and self.sampling.is_truncated(text.sample)):
                new_labels[row, len(text.prompt) : length] = labels.new_tensor(text.sample)
        return {**batch, "input_ids": new_ids, "attention_mask": new_mask, "labels": new_labels, OWN: numbers}

    def _until_stop(self, row: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(row) if token in self.sampling.stop_ids), len(row) - 1)
        return row[: end + 1]

    def _is_sharded(self) -> bool:
        """Whether a forward pass needs all ranks (ZeRO-3, FSDP)."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        is_zero3 = plugin is not None and plugin.zero_stage == 3
        return is_zero3 or getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def _most_of_all_ranks(self, count: int) -> int:
        counts = self.accelerator.gather(torch.tensor([count], device=self.accelerator.device))
        return int(counts.max())
