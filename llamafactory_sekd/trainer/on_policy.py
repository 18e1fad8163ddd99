"""Whose text a step trains on: the student's own samples in place of references (on-policy distillation).

Distillation on fixed references trains the student on prefixes that it never produces itself. On-policy distillation
(GKD, arXiv 2306.13649) replaces the response of a share of the examples by the present student's own sample and lets
the teacher judge it: λ is 1 there, because a sample is no ground truth.

The replacement happens where the trainer has collected the micro-batches of a step and has not counted their tokens
yet. So accumulation, ranks and the division by the token count stay those of any other step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig, LogitsProcessorList
from transformers.utils import logging

from llamafactory_sekd.errors import ArgumentError, DataError
from llamafactory_sekd.files import write_atomic
from llamafactory_sekd.objectives import IGNORE_INDEX
from llamafactory_sekd.teacher.several_teachers import TEACHER_NUMBER
from llamafactory_sekd.trainer.sampling import InverseTransform, RowDraws, Sampling, as_generator, uniforms_of


logger = logging.get_logger(__name__)

OWN = "own_sample"  # bool [batch], in a batch: the rows whose response is the student's own
_TEXT_KEYS = {"input_ids", "attention_mask", "labels", TEACHER_NUMBER}
_SHOWN = 8  # samples of a step that are looked at and written down
# What is counted in a logging window: examples, own samples, their tokens and those of the references, truncated ones,
# seconds; samples looked at, loops and other languages among them.
_COUNTS = 9
# With fewer samples looked at, a share of loops says little.
_ENOUGH = 16
_ROUND_TO = 8  # the host pads training batches to a multiple of 8
# Prompt and new tokens that are decoded at a time; bounds the key-value cache, as `batch_tokens` does in evaluation.
TOKENS_AT_A_TIME = 16384


# Decodes so that rows which have ended leave. In: the model, prompts, what chooses each token (None: the most likely),
# and the longest sample. Out: groups of (place, new tokens), or None where the model needs `generate`; and whether
# prompts of different lengths may share a batch there.
_Groups = Iterator[list[tuple[int, list[int]]]]
Search = Callable[[Any, Sequence[list[int]], RowDraws | None, int], tuple[_Groups | None, bool]]


@dataclass(frozen=True)
class Look:
    """What is wrong with the text of a sample: it repeats itself, or is in another language than the reference."""

    loops: bool
    other_language: bool


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
        every: samples are drawn for so many steps at once, with the weights of the first.
        drop_truncated: leave samples that hit the limit out of the loss.
        sampling: how to sample.
        cutoff_len: the longest sequence of prompt and sample.
        seed: decides, with epoch and example, which examples are replaced and what is drawn.
        decode: token ids to text, for the table of samples.
        look: what is wrong with a sample, from its tokens and those of the reference.
        search: decodes faster than `generate` does; None, and sharded models, take `generate`.
        accelerator: the trainer's.
        output_dir: ``samples/step-N.jsonl`` is written into it.
    """

    def __init__(
        self,
        share: float,
        every: int,
        drop_truncated: bool,
        sampling: Sampling,
        cutoff_len: int,
        seed: int,
        decode: Callable[[list[int]], str],
        accelerator: Any,
        output_dir: str | Path,
        look: Callable[[list[int], list[int]], Look] = lambda sample, reference: Look(False, False),
        search: Search | None = None,
    ) -> None:
        self.share = share
        self.every = every
        self.drop_truncated = drop_truncated
        self.sampling = sampling
        self.cutoff_len = cutoff_len
        self.seed = seed
        self.decode = decode
        self.accelerator = accelerator
        self.folder = Path(output_dir) / "samples"
        self.look = look
        self.search = search
        self._window = torch.zeros(_COUNTS, dtype=torch.float64)  # of numbers on this side, never on the device
        self._judged = torch.zeros(2, dtype=torch.float64)  # on the device: tokens judged, and their -log q
        self._shown: list[dict[str, Any]] = []
        self._drawn: dict[str, list[int]] = {}  # for the present step and those that were drawn for with it
        self._restored: dict[str, list[int]] = {}
        self._warned: set[str] = set()
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is not None and getattr(plugin, "fsdp_version", 1) == 1:
            raise ArgumentError(
                "`kd_on_policy` cannot generate under FSDP 1, which flattens the weights that generation reads: set "
                "`fsdp_version: 2` in the configuration of accelerate, or use DeepSpeed."
            )

    def draw(self, model: Any, batches: list[dict[str, Any]], epoch: int) -> None:
        """Draw a sample for each chosen example of ``batches``, of one step or several; all ranks call this together.

        The first drawing after a restart takes what the checkpoint has: it is from weights that are gone.

        Raises:
            DataError: a row holds more than one response, or a batch more than text.
        """
        started = time.perf_counter()
        chosen = {example.name: example for example in self._chosen(batches, epoch)}
        known = {name: self._restored[name] for name in chosen if name in self._restored}
        self._restored = {}
        missing = [example for name, example in chosen.items() if name not in known]
        samples = self._generate(model, missing) if missing or self._is_sharded() else []
        self._drawn = known | {example.name: sample for example, sample in zip(missing, samples, strict=True)}
        self._window[5] += time.perf_counter() - started

    def state(self) -> dict[str, list[int]]:
        """Return the samples of all ranks that steps to come may need, by example; all ranks call this together."""
        if self.every == 1:  # each step draws its own
            return {}
        return dict(gather_object(list(self._drawn.items())))

    def restore(self, samples: dict[str, list[int]]) -> None:
        """Take over what :meth:`state` returned when the checkpoint was written."""
        self._restored = samples

    def replace(self, batches: list[dict[str, Any]], epoch: int) -> None:
        """Replace the chosen responses of the micro-batches of a step, in place, by what was drawn for them."""
        started = time.perf_counter()
        chosen = self._chosen(batches, epoch)
        samples = [self._drawn[example.name] for example in chosen]
        for number, batch in enumerate(batches):
            own = [place for place, example in enumerate(chosen) if example.batch == number]
            batches[number] = self._with_samples(batch, {chosen[p].row: (p, chosen[p], samples[p]) for p in own})

        shown = list(zip(chosen[:_SHOWN], samples, strict=False))
        looks = [self.look(sample, example.reference) for example, sample in shown]
        self._shown = [
            {
                "source": self.decode(example.prompt),
                "sample": self.decode(sample),
                "reference": self.decode(example.reference),
            }
            for example, sample in shown
        ]
        counts = (
            sum(int((batch["labels"] != IGNORE_INDEX).any(-1).sum()) for batch in batches),
            len(chosen),
            sum(map(len, samples)),
            sum(len(example.reference) for example in chosen),
            sum(map(self._is_truncated, samples)),
            time.perf_counter() - started,
            len(looks),
            sum(look.loops for look in looks),
            sum(look.other_language for look in looks),
        )
        self._window[: len(counts)] += torch.tensor(counts, dtype=torch.float64)

    def judge(self, numbers: torch.Tensor, rows: torch.Tensor, ce: torch.Tensor, teacher_ce: torch.Tensor) -> None:
        """Note what student and teacher say of the samples of a micro-batch.

        Args:
            numbers: ``[batch]`` int64, what ``OWN`` holds.
            rows: ``[batch, length]`` bool, the positions that predict response tokens.
            ce: ``[tokens]``, -log q of each response token.
            teacher_ce: ``[tokens]``, -log p of each.
        """
        is_own = (numbers >= 0).unsqueeze(-1).expand_as(rows)[rows].to(ce.device)
        own = torch.stack([is_own.sum().double(), torch.where(is_own, ce.double(), 0.0).sum()])
        self._judged = self._judged.to(own.device) + own  # moved once: no waiting for the device in each micro-batch
        if not self._shown:
            return
        counts = rows.sum(-1).tolist()
        for number, values in zip(numbers.tolist(), teacher_ce.split(counts), strict=True):
            if 0 <= number < len(self._shown):
                self._shown[number]["teacher_logprob"] = -values.mean()

    def logs(self) -> dict[str, float]:
        """Return the means of the window over all ranks, which call this together, and start a new window."""
        device = self.accelerator.device
        window = torch.cat([self._window.to(device), self._judged.to(device)])
        window = self.accelerator.reduce(window, reduction="sum")
        examples, own, length, expected, truncated, seconds, seen, loops, others, tokens, ce = window.tolist()
        self._window, self._judged = torch.zeros_like(self._window), torch.zeros_like(self._judged)
        metrics = {"kd/on_policy": own / max(1.0, examples), "gen/seconds": seconds / self.accelerator.num_processes}
        if own:
            metrics |= {"gen/length": length / own, "gen/truncated": truncated / own}
            self._warn_of_explosion(length / max(1.0, expected), truncated / own)
        if seen:
            metrics |= {"gen/loops": loops / seen, "gen/other_language": others / seen}
            self._warn_of_bad_text(seen, loops, others)
        if tokens and self.sampling.is_plain and self.every == 1:
            # The mean of -log q over draws from q estimates q's entropy; older samples are draws from another q.
            metrics["kd/entropy"] = ce / tokens
        return metrics

    def write(self, step: int) -> None:
        """Write the samples of the step that just ended and what the teacher said of them."""
        if not self._shown or not self.accelerator.is_main_process:
            return
        entries = [
            {**entry, "teacher_logprob": float(entry["teacher_logprob"]) if "teacher_logprob" in entry else None}
            for entry in self._shown
        ]
        lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / f"step-{step}.jsonl", "".join(f"{line}\n" for line in lines).encode())

    def _chosen(self, batches: list[dict[str, Any]], epoch: int) -> list[_Example]:
        return [example for number, batch in enumerate(batches) for example in self._choose(batch, number, epoch)]

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
                    f"without a label: {self.decode(ids[:length])[:200]!r}. Set `mask_history: true` and "
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

    def _with_samples(self, batch: dict[str, Any], own: dict[int, tuple[int, _Example, list[int]]]) -> dict[str, Any]:
        """Return the micro-batch with its samples: padded on the right again, as the host pads in training."""
        ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
        numbers = torch.full((len(ids),), -1, device=ids.device)
        if not own:
            return {**batch, OWN: numbers}

        lengths = mask.sum(-1).tolist()
        for row, (_, example, sample) in own.items():
            lengths[row] = len(example.prompt) + len(sample)
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
            number, example, sample = own[row]
            numbers[row] = number
            start = len(example.prompt)
            new_ids[row, :length] = ids.new_tensor(example.prompt + sample)
            if not (self.drop_truncated and self._is_truncated(sample)):
                new_labels[row, start:length] = labels.new_tensor(sample)
        return {**batch, "input_ids": new_ids, "attention_mask": new_mask, "labels": new_labels, OWN: numbers}

    def _until_stop(self, row: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(row) if token in self.sampling.stop_ids), len(row) - 1)
        return row[: end + 1]

    def _is_truncated(self, sample: list[int]) -> bool:
        return sample[-1] not in self.sampling.stop_ids

    def _is_sharded(self) -> bool:
        """Whether a forward pass needs all ranks (ZeRO-3, FSDP)."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        is_zero3 = plugin is not None and plugin.zero_stage == 3
        return is_zero3 or getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def _most_of_all_ranks(self, count: int) -> int:
        counts = self.accelerator.gather(torch.tensor([count], device=self.accelerator.device))
        return int(counts.max())

    def _warn_of_explosion(self, ratio: float, truncated: float) -> None:
        if "length" in self._warned or (ratio < 2.0 and truncated < 0.5):
            return
        self._warned.add("length")
        logger.warning(
            f"The student's own samples are {ratio:.1f} times as long as the references, and {truncated:.0%} of them "
            "hit the limit without an end token. Usually the student does not know the template's end token: "
            "fine-tune it with the same template first, or set `kd_on_policy_truncated: drop`."
        )

    def _warn_of_bad_text(self, seen: float, loops: float, others: float) -> None:
        for kind, count, what in (
            ("loops", loops, "repeat themselves"),
            ("language", others, "are in another language than the references"),
        ):
            if kind not in self._warned and seen >= _ENOUGH and count >= seen / 2:
                self._warned.add(kind)
                logger.warning(
                    f"{count / seen:.0%} of the student's own samples {what}: the teacher judges text that is no "
                    "translation. Fine-tune the student on references first, or lower `kd_on_policy`."
                )
