"""Adds up a run's memory: what stays, and what the two moments of a step need that can be the worst."""

from __future__ import annotations

from dataclasses import dataclass

from llamafactory_sekd.planner.planned_run import Run, Sharding
from llamafactory_sekd.planner.rehearsal import Rehearsal, rehearse


# The driver's context, cuBLAS and NCCL: an assumption, the one number here that is neither counted nor measured.
CONTEXT = 2**30
# Adam's two moments, assumed of an optimizer that is not in the list.
ASSUMED_STATE = 8.0


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what it is.
        why: where the numbers come from.
        backward: bytes on each device at the peak of forward and backward pass.
        step: bytes on each device in the optimizer's step.
        host: bytes in main memory, per device.
    """

    name: str
    why: str
    backward: int = 0
    step: int = 0
    host: int = 0


@dataclass(frozen=True)
class Estimate:
    """The memory of a run.

    Attributes:
        rows: its parts.
        notes: what was assumed or left out.
    """

    rows: list[Row]
    notes: list[str]

    @property
    def backward(self) -> int:
        """Bytes on each device at the peak of forward and backward pass."""
        return sum(row.backward for row in self.rows)

    @property
    def step(self) -> int:
        """Bytes on each device in the optimizer's step."""
        return sum(row.step for row in self.rows)

    @property
    def device(self) -> int:
        """Bytes on each device at the worst moment."""
        return max(self.backward, self.step)

    @property
    def host(self) -> int:
        """Bytes in main memory, per device."""
        return sum(row.host for row in self.rows)


def estimate(run: Run, libraries: int = CONTEXT) -> Estimate:
    """Estimate the memory of a run.

    Args:
        run: the run.
        libraries: bytes that a process takes before it has any tensor: the device's context, or on the CPU what the
            imported libraries take.
    """
    ledger = _Ledger(run, rehearse(run))
    libraries_are = "context, cuBLAS, NCCL: assumed" if run.accelerator else "imported by each rank"
    rows = [
        ledger.parameters(),
        ledger.gradients(),
        ledger.optimizer_states(),
        ledger.optimizer_copies(),
        ledger.teacher(),
        ledger.gathered(),
        ledger.buckets(),
        *ledger.rehearsed(),
        _always("libraries", libraries_are, libraries),
    ]
    return Estimate([row for row in rows if row.backward or row.step or row.host], ledger.notes())


def _always(name: str, why: str, size: int, in_host: bool = False) -> Row:
    return Row(name, f"{why}, in main memory", host=size) if in_host else Row(name, why, backward=size, step=size)


class _Ledger:
    """The rows of a run, from what it keeps and what was rehearsed."""

    def __init__(self, run: Run, rehearsal: Rehearsal) -> None:
        self.run = run
        self.rehearsal = rehearsal
        self.student = rehearsal.student
        self.sharding = run.sharding or Sharding(stage=0)
        self.trained = self.student.trainable
        engine = run.engine_dtype
        self.gradient_size = engine.itemsize if engine else self.student.trainable_bytes // max(self.trained, 1)
        # A quantized teacher stays complete on each device.
        quantized = run.teacher is not None and run.teacher.quantization_bit is not None
        self.teachers = run.place.sharding or self.sharding
        self.teacher_is_sharded = self.teachers.shards_parameters and not quantized

    def parameters(self) -> Row:
        why = f"{_count(self.student.parameters)}, {_count(self.trained)} of them trained"
        is_sharded = self.sharding.shards_parameters
        size = self._share(self.student.bytes, is_sharded)
        return _always("parameters", why + self._over(is_sharded), size, self.sharding.offload_param)

    def gradients(self) -> Row:
        if self.sharding.shards_gradients:
            size = self._share(self.trained * self.gradient_size, True)
            why = f"{self.gradient_size} bytes per trained parameter" + self._over(True)
            return _always("gradients", why, size, self.sharding.offload_optimizer)
        before_step = self.rehearsal.peak["gradients"]
        return Row("gradients", "those that exist at the time", before_step, self.trained * self.gradient_size)

    def optimizer_states(self) -> Row:
        states = state_bytes(self.run.optimizer)
        per_parameter = ASSUMED_STATE if states is None else states
        why = f"{per_parameter:g} bytes per trained parameter"
        if self.run.sharding is not None:
            per_parameter += 4
            why = f"{per_parameter:g} bytes per trained parameter, its float32 copy included"

        is_sharded = self.sharding.shards_optimizer
        size = self._share(int(self.trained * per_parameter), is_sharded)
        return _always("optimizer states", why + self._over(is_sharded), size, self.sharding.offload_optimizer)

    def optimizer_copies(self) -> Row:
        name = "optimizer's copies"
        if self.run.sharding is None:
            if copies_nothing(self.run.optimizer):
                return Row(name, "")
            elements = self.trained if self.run.accelerator else 2 * self.student.largest_trainable
            return Row(name, "`optim: adamw_torch_fused` needs none", step=4 * elements)
        if self.sharding.offload_optimizer:
            return Row(name, "")
        elements = self._share(self.trained, self.sharding.shards_optimizer)
        if self.sharding.stage == 3:
            elements = min(elements, self.sharding.sub_group)

        return Row(name, "gradients in float32", step=4 * elements)

    def teacher(self) -> Row:
        teacher = self.rehearsal.teacher
        if teacher is None and self.run.distillation is not None:
            return _always(
                "teacher", "only its head; the answers are cached", self.student.head * self.student.item_size
            )
        if teacher is None:
            return Row("teacher", "")
        place, is_sharded = self.run.place, self.teacher_is_sharded
        if place.kind == "student":
            return _always("teacher", "its adapters; the base is the student's", place.adapters)
        why = f"{_count(teacher.parameters)}, {8 * teacher.bytes / teacher.parameters:.3g} bits each"
        if place.kind != "device" and not is_sharded:
            here = (teacher.head + (teacher.largest_leaf if place.streamed else 0)) * teacher.item_size
            host = teacher.bytes if place.kind == "main memory" else 0
            what = "its head and the largest layer" if place.streamed else "its head"
            return Row("teacher", f"{what}; {why}, in {place.kind}", backward=here, step=here, host=host)
        size = self._share(teacher.bytes, is_sharded)
        return _always("teacher", why + self._over(is_sharded), size, self.teachers.offload_param and is_sharded)

    def gathered(self) -> Row:
        """ZeRO-3 gathers weights as they are needed."""
        size = 0
        if self.sharding.shards_parameters:
            # Weights whose next use is near stay: those in the last part of the forward pass, used first in the
            # backward.
            kept = self.sharding.reuse_distance // 2 + self.sharding.prefetch + self.student.largest_leaf
            size += self.student.item_size * min(self.student.parameters, kept)

        teacher = self.rehearsal.teacher
        if teacher is not None and self.teacher_is_sharded:
            size += teacher.item_size * min(teacher.parameters, self.teachers.prefetch + teacher.largest_leaf)

        return Row("gathered weights", "those in use or soon used again", backward=size)

    def buckets(self) -> Row:
        """Return what is sent to the other devices at once."""
        if self.run.sharding is None:
            size = self.trained * self.gradient_size if self.run.devices > 1 else 0
            return _always("buckets", "DDP's copy of the gradients", size)
        elements = min(self.sharding.reduce_bucket, self.trained)
        return _always("buckets", "for reducing gradients", self.sharding.buckets * elements * self.gradient_size)

    def rehearsed(self) -> list[Row]:
        """Return what the forward and backward pass has at its peak in addition to gradients."""
        peak, run, is_fused = self.rehearsal.peak, self.run, self.rehearsal.fused
        answers = "hidden states" if is_fused else "logits of all tokens"
        rows = [
            Row("activations", f"{run.batch_size} sentences of {run.length} tokens", peak["activations"]),
            Row("teacher's answers", answers, peak["teacher"]),
        ]
        how = "in the head, chunk by chunk, with the head's gradient" if is_fused else "on the logits of all tokens"
        return [*rows, Row("objective", how, peak["objective"])]

    def notes(self) -> list[str]:
        notes = []
        if self.rehearsal.obstacle:
            notes.append(f"the step could not be rehearsed, activations are not counted ({self.rehearsal.obstacle})")

        if self.run.distillation is not None and self.run.teacher is None:
            notes.append("the cached teacher is taken to be as wide as the student")

        if state_bytes(self.run.optimizer) is None:
            notes.append(
                f"the optimizer {self.run.optimizer} is not known, {ASSUMED_STATE:g} bytes per parameter assumed"
            )

        return notes

    def _share(self, size: int, is_shared: bool) -> int:
        return -(-size // self.run.devices) if is_shared else size

    def _over(self, is_shared: bool) -> str:
        return f" / {self.run.devices} devices" if is_shared and self.run.devices > 1 else ""


def _count(parameters: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"

    return str(parameters)


# The host's `optim`, by how it begins -> bytes per trainable parameter. The first that fits counts.
STATE_BYTES: tuple[tuple[str, float], ...] = (
    ("adamw_bnb_8bit", 2),
    ("adamw_8bit", 2),
    ("paged_adamw_8bit", 2),
    ("paged_adamw", 8),
    ("adamw_torch_8bit", 2),
    ("adamw_torch_4bit", 1),
    ("adamw", 8),
    ("adafactor", 0),  # a row and a column per matrix
    ("lion_8bit", 1),
    ("paged_lion_8bit", 1),
    ("lion", 4),
    ("paged_lion", 4),
    ("sgd", 0),
    ("rmsprop", 4),
    ("adagrad", 4),
)


def state_bytes(optimizer: str) -> float | None:
    """Bytes that an optimizer keeps per trainable parameter; None where that is not known."""
    return next((size for prefix, size in STATE_BYTES if optimizer.startswith(prefix)), None)


def copies_nothing(optimizer: str) -> bool:
    """Whether it updates parameters without copies of them."""
    return optimizer.endswith("_fused") or "bit" in optimizer or "bnb" in optimizer
