"""The distillation trainer, as a mixin over Hugging Face's: it computes the loss and its metrics, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import TrainOutput, has_length
from transformers.utils import logging

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.checkpoints import DistillationState, forget_completion
from llamafactory_sekd.errors import TeacherError
from llamafactory_sekd.files import read_json
from llamafactory_sekd.formula import Formula
from llamafactory_sekd.lm_head import (
    is_plain_product,
    logit_transform,
    rows_of,
    selected_rows,
)
from llamafactory_sekd.objectives import (
    IDENTITY,
    IGNORE_INDEX,
    LogitTransform,
    default_chunk_size,
    product_type,
    response_positions,
)
from llamafactory_sekd.teacher import TeacherSource
from llamafactory_sekd.trainer.adaptive import AdaptiveKeys, EndOfStep
from llamafactory_sekd.trainer.batches import RepeatedSteps, hold_epoch, is_empty
from llamafactory_sekd.trainer.health import Finished, StopWhenFinished, WarnOfIdleRun
from llamafactory_sekd.trainer.metrics import METRICS, NONFINITE, TokenMeans
from llamafactory_sekd.trainer.on_policy import OWN, OwnSamples
from llamafactory_sekd.trainer.token_difficulty import TokenSums, WriteTokenTable, save_sums
from llamafactory_sekd.trainer.training_step import RouterLoss, TokenGroup, TrainingStep, groups_of_tokens


logger = logging.get_logger(__name__)
RESULTS = "train_results.json"  # as the host names it


class DistillationTrainer(Seq2SeqTrainer):
    """Trains a student on the ground truth and a frozen teacher's distributions (design: equations 3 to 10).

    The host mixes it in front of its own trainer. The loss is summed over the response tokens of the micro-batch and
    divided by their number in the global batch: all accumulation steps, all ranks.

    Args:
        make_teacher: from the trainer's accelerator to the teacher, computed or read from a cache.
        distillation: the stage's keys.
        vocab_size: how many rows of both heads to read, None for all.
        teacher_fingerprint: what checkpoints record of the teacher's files, None where there are none.
        make_own_samples: from the trainer's accelerator to what replaces responses by the student's own samples, None
            where it trains on references alone.
    """

    def __init__(
        self,
        *args: Any,
        make_teacher: Callable[[Any], TeacherSource],
        distillation: DistillationArguments,
        vocab_size: int | None = None,
        teacher_fingerprint: str | None = None,
        make_own_samples: Callable[[Any], OwnSamples] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # Without it the trainer would divide by the number of accumulation steps as well.
        self.model_accepts_loss_kwargs = True
        self.distillation = distillation
        self.vocab_size = vocab_size
        self.teacher_fingerprint = teacher_fingerprint
        self.teacher = make_teacher(self.accelerator)
        self.student_head: Any = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        self.adaptive = AdaptiveKeys(distillation, self.accelerator.device)
        self.add_callback(StopWhenFinished())
        self.add_callback(EndOfStep(self.adaptive, self.accelerator))
        self.token_sums = TokenSums(self.student_head.out_features, self.accelerator.device)
        self.add_callback(WriteTokenTable(self.token_sums, self.accelerator))
        self.router_loss = RouterLoss(self.accelerator.unwrap_model(self.model))
        self.add_callback(WarnOfIdleRun(distillation))
        self.formula = distillation.formula()
        self.train_means, self.eval_means = self._new_means(), self._new_means()
        self.own_samples = make_own_samples(self.accelerator) if make_own_samples else None
        self._fused: bool | None = None
        self._chunk_size: int | None = None
        self._student_transform: LogitTransform | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the host does; a run that is finished already trains no further step and says so."""
        try:
            return super().train(*args, **kwargs)
        except Finished:
            self._restore_sums(self.args.resume_from_checkpoint)  # for what is written at the end
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            logger.warning(
                f"This run is finished: {self.state.global_step} of {self.state.max_steps} steps are done, and no "
                "further step is trained. Raise `num_train_epochs` or `max_steps` to continue."
            )
            return TrainOutput(self.state.global_step, 0.0, read_json(Path(self.args.output_dir, RESULTS)) or {})

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch, a scalar; with ``return_outputs`` also a dict for the prediction loop."""
        rows, targets = response_positions(inputs["labels"])
        numbers = inputs.get(OWN)
        batch = {name: value for name, value in inputs.items() if name not in ("labels", OWN)}
        inputs = self._without_the_teachers(batch)
        num_items = targets.numel() if num_items_in_batch is None else num_items_in_batch
        num_items = torch.as_tensor(num_items, device=targets.device).clamp(min=1)
        groups = tuple(groups_of_tokens(numbers, rows))
        step = TrainingStep(self.student_head, targets, num_items, self._objective_keywords, self.vocab_size, groups)

        outputs: dict[str, torch.Tensor] = {}
        if return_outputs and self.compute_metrics is not None:
            answer = model(**inputs)  # the host's accuracy reads logits of every position
            outputs["logits"] = answer.logits
            loss, statistics = step.loss_of_logits(answer.logits[rows], self.teacher.logits(batch, rows))
        elif self._use_fused_path(model, inputs):
            answer, loss, statistics = step.loss_in_head(
                lambda: model(**inputs, use_cache=False),
                rows_of(rows),
                self.teacher.answers(batch, rows),
                transform=self._student_transform or IDENTITY,
                chunk_size=self.chunk_size(),
                compile=bool(self.distillation.kd_compile),
            )
        else:
            with selected_rows(self.student_head, rows_of(rows)):
                answer = model(**inputs, use_cache=False)
            loss, statistics = step.loss_of_logits(answer.logits[0], self.teacher.logits(batch, rows))

        # As in the host's SFT: once per micro-batch, whatever their number.
        loss = loss + self.router_loss.of(answer, trains=model.training)

        if model.training:
            self.adaptive.add(statistics)
            self.token_sums.add(targets, statistics)
            if self.own_samples is not None and numbers is not None:
                self.own_samples.log.judge(numbers, rows, statistics.ce, statistics.teacher_ce)

        means = self.train_means if model.training else self.eval_means
        who = self.teacher.who_answers(batch, rows) if self.teacher.names else None
        means.add(statistics, loss.detach() * num_items, who)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks, `num_items` counts all

        return (loss, {"loss": loss, **outputs}) if return_outputs else loss

    def _use_fused_path(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Decide once, from the architecture alone, so that all ranks decide alike."""
        if self._fused is None:
            if is_plain_product(self.student_head):
                self._student_transform = logit_transform(model, self.student_head, inputs)
            student_fits = self._student_transform is not None
            self._fused = student_fits and self.teacher.can_answer_in_chunks(inputs)
            if self._fused:
                size = self.chunk_size()
                logger.info(f"The objective takes {size} response tokens at a time in the LM head (`kd_chunk_size`).")
            else:
                who = "teacher" if student_fits else "student"
                logger.warning_once(
                    f"The {who}'s logits are more than a product of its LM head (adapter, quantization or FSDP1): "
                    f"the objective is computed on the logits of all response tokens at once.{self._idle_keys()}"
                )

        return self._fused

    def _idle_keys(self) -> str:
        """Return a sentence about the keys of the path inside the head, where some are set; empty where none is."""
        names = [f"`{key}`" for key in ("kd_chunk_size", "kd_compile") if getattr(self.distillation, key)]
        return f" {' and '.join(names)} {'have' if len(names) > 1 else 'has'} no effect." if names else ""

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the host does, and say which metrics there are not."""
        if self.args.predict_with_generate:
            logger.warning_once(
                "`predict_with_generate: true`: this evaluation generates, and asks no teacher. There is no "
                "`eval_loss` and no `eval_kd/…`; without the key there are both."
            )
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Generate from the student's inputs alone; everything else is the host's."""
        inputs = self._without_repeated(inputs)
        if self.args.predict_with_generate:
            inputs = self._without_the_teachers(inputs)

        return super().prediction_step(model, inputs, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Return the host's, whose order after a restart is as before, with each step as often as it is trained."""
        loader = super().get_train_dataloader()
        hold_epoch(loader)
        if self._uses == 1:
            return loader

        accumulation = self.args.gradient_accumulation_steps
        loader = RepeatedSteps(loader, accumulation, self._uses, self._without_repeated, self._current_epoch)
        text = f"Own samples: each is used in {self._uses} steps"
        if has_length(loader):
            steps = len(loader) // accumulation
            text += f", so an epoch has {steps:,} steps in place of {steps // self._uses:,}"
        if self.args.process_index == 0:
            print(f"{text} (`kd_on_policy_every`).", flush=True)
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of a step; samples that only fill up the epoch's last batch have no labels."""
        if self._uses == 1:
            epoch_iterator = map(self._without_repeated, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on a micro-batch as the host does; an empty one has neither loss nor gradient."""
        if is_empty(inputs):
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, *args, **kwargs)

    @property
    def _uses(self) -> int:
        """How many steps, one after the other, train on the same micro-batches."""
        return self.own_samples.every if self.own_samples is not None else 1

    def _current_epoch(self) -> int:
        # `state.epoch` is an integer after an epoch's last step; rounding must not leave it just below, and not take
        # an epoch of a million steps for over before its last one.
        return int((self.state.epoch or 0.0) + 1e-9)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Replace responses by own samples before the tokens of the step are counted."""
        if self.own_samples is not None and batch_samples:
            model = self.accelerator.unwrap_model(self.model_wrapped)
            self.own_samples.replace(model, batch_samples, self._current_epoch())
            self.teacher.announce([batch for batch in batch_samples if not is_empty(batch)])

        return super()._get_num_items_in_batch(batch_samples, device)

    def _without_repeated(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Take the labels from the samples that fill up the last batch so that every rank has one of the same size.

        Accelerate repeats samples from the start; counted twice they would bias the mean of the step, or of the
        evaluation. It keeps of the last batch, over all ranks in order, the first `remainder` samples.
        """
        state = self.accelerator.gradient_state
        if "labels" not in batch or not state.end_of_dataloader or state.remainder <= 0:
            return batch

        labels = batch["labels"].clone()
        labels[max(0, state.remainder - self.args.process_index * len(labels)) :] = IGNORE_INDEX
        return {**batch, "labels": labels}

    def _without_the_teachers(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name not in self.teacher.collated_keys}

    def _objective_keywords(self, group: TokenGroup) -> dict[str, Any]:
        keywords = self.distillation.objective_keywords(lambda a, b: self._moved(a, b, self.state.global_step))
        keywords |= {**self.adaptive.keywords(), **group.keywords}
        if group.keywords and isinstance(keywords["kd_loss"], Formula):
            keywords["kd_loss"] = keywords["kd_loss"].without_reference()
        return keywords

    def _moved(self, start: float, end: float, step: int) -> float:
        """Return a number that moves linearly: ``start`` at step 0, ``end`` at the last step (paper, Figure 3)."""
        return start + (end - start) * min(step / max(self.state.max_steps - 1, 1), 1.0)

    def _new_means(self) -> TokenMeans:
        gate = self.formula.gate
        signal = None if gate is None or f"kd/{gate.signal}" in METRICS else gate.signal
        return TokenMeans(self.teacher.names, signal)

    def chunk_size(self) -> int:
        """Return the number of response tokens that the objective takes at a time in the student's head."""
        if self._chunk_size is None:
            head = self.student_head  # the weight itself may be sharded
            dtype, device = product_type(head.weight), self.accelerator.device
            chosen = self.distillation.kd_chunk_size
            self._chunk_size = chosen or default_chunk_size(head.out_features, dtype, device=device)
        return self._chunk_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the logging window to a training log; other logs pass through."""
        if "loss" in logs:
            _, metrics = self.train_means.read(self.accelerator)
            self._refuse_a_broken_teacher(metrics)
            metrics |= self.adaptive.logs() | self.router_loss.logs(self.accelerator)
            if self.own_samples is not None:
                metrics |= self.own_samples.log.means()
                self.own_samples.log.write(self.state.global_step)
            logs = {**logs, **{name: round(value, 6) for name, value in metrics.items()}}
            beta, end = self.distillation.kd_beta, self.distillation.kd_beta_end
            if end is not None:
                logs["kd/beta"] = round(self._moved(beta, end, self.state.global_step - 1), 6)  # the step that ended

        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, with the loss and the metrics as means over all response tokens, whatever the batches were."""
        self.eval_means = self._new_means()
        output = super().evaluation_loop(*args, **kwargs)
        loss, metrics = self.eval_means.read(self.accelerator)
        self._refuse_a_broken_teacher(metrics)
        if loss is not None:
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics[f"{prefix}_loss"] = loss
            output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})

        return output

    def _refuse_a_broken_teacher(self, metrics: dict[str, float]) -> None:
        """All ranks read the same sums, so all of them stop here together."""
        share, limit = metrics.get(NONFINITE, 0.0), self.distillation.teacher_max_nonfinite
        if share > limit:
            raise TeacherError(
                f"the teacher's logits are NaN or infinite at {share:.2%} of the response tokens, more than "
                f"`teacher_max_nonfinite: {limit}` allows: look at the teacher's weights and its precision (float16 "
                "overflows where bfloat16 does not)."
            )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save as the host does; a checkpoint that is written over counts as half-written until it is done."""
        if self.args.should_save:
            forget_completion(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

        super()._save_checkpoint(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save what is each rank's own and, once all ranks have done so, what is ours.

        `trainer_state.json` follows last, so it says that the files of all ranks are there.
        """
        super()._save_rng_state(output_dir)
        window = self.train_means.total(self.accelerator)
        tokens = self.token_sums.total(self.accelerator)
        samples = self.own_samples.state(self.state.global_step) if self.own_samples is not None else {}
        if self.args.should_save:
            DistillationState(self.teacher_fingerprint, window, self.adaptive.state(), samples).save(output_dir)
            save_sums(tokens, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # Here, because the first step's batches are collected before random numbers and sums are restored. Every rank
        # reads all samples: an example may be on another rank now.
        if self.own_samples is not None and checkpoint is not None:
            self.own_samples.restore(DistillationState.load(checkpoint).own_samples)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._restore_sums(checkpoint)

    def _restore_sums(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return

        # Sums over all ranks, which one of them holds for all.
        first = self.args.process_index == 0
        state = DistillationState.load(checkpoint) if first else DistillationState()
        self.token_sums.restore(checkpoint if first else None)
        self.train_means.restore(state.window, self.accelerator.device)
        self.adaptive.restore(state.adaptive, self.accelerator)
