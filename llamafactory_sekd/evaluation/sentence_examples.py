"""The sentences on which the systems differ most."""

from __future__ import annotations

from dataclasses import dataclass

from sacrebleu.metrics.chrf import CHRF

from llamafactory_sekd.evaluation.evaluation_results import Evaluated


EXAMPLES = 20


@dataclass(frozen=True)
class Output:
    """One system's translation of an example, with its sentence chrF2 (0 to 100) against the reference."""

    system: str
    text: str
    chrf: float


@dataclass(frozen=True)
class Example:
    """A sentence of the test set; ``number`` is its line, counted from 1. The best output comes first."""

    direction: str
    number: int
    source: str
    reference: str
    outputs: tuple[Output, ...]

    @property
    def spread(self) -> float:
        """Return how far the systems are apart in sentence chrF2; of a single one, how far the reference is."""
        return (self.outputs[0].chrf if len(self.outputs) > 1 else 100.0) - self.outputs[-1].chrf


def most_different(data: Evaluated) -> list[Example]:
    """Return the :data:`EXAMPLES` sentences with the widest spread of sentence chrF2 among the systems.

    Of a single system they are those with the lowest sentence chrF2. Every direction has its part, so that one with
    noisy references does not take all places; no source appears twice in a direction.
    """
    by_direction = [_by_spread(data, direction) for direction in data.test_sets]
    chosen: list[Example] = []
    for row in range(max(map(len, by_direction))):
        chosen += [examples[row] for examples in by_direction if row < len(examples)]
    return sorted(chosen[:EXAMPLES], key=lambda example: (-example.spread, example.direction, example.number))


def _by_spread(data: Evaluated, direction: object) -> list[Example]:
    test_set = data.test_sets[direction]  # type: ignore[index]
    lines = {name: by_direction[direction].lines for name, by_direction in data.hypotheses.items()}  # type: ignore[index]
    metric = CHRF()
    examples: list[Example] = []
    for index, (source, reference) in enumerate(zip(test_set.sources, test_set.references, strict=True)):
        texts = {name: system_lines[index] for name, system_lines in lines.items()}
        if len(texts) > 1 and len(set(texts.values())) == 1:
            continue
        scores = {text: metric.sentence_score(text, [reference]).score for text in set(texts.values())}
        outputs = [Output(name, text, scores[text]) for name, text in texts.items()]
        outputs.sort(key=lambda output: -output.chrf)
        examples.append(Example(str(direction), index + 1, source, reference, tuple(outputs)))
    examples.sort(key=lambda example: (-example.spread, example.number))
    once = {example.source: example for example in reversed(examples)}
    return [example for example in examples if once[example.source] is example][:EXAMPLES]
