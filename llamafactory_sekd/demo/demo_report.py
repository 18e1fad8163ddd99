"""The demo's report: the evaluation's scores, also without near-duplicates, the training plots, what it all means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llamafactory_sekd.demo.data import DIRECTION, near_duplicates
from llamafactory_sekd.evaluation.evaluation_report import differing
from llamafactory_sekd.evaluation.hypotheses import read_hypotheses
from llamafactory_sekd.evaluation.scores import surface_metric
from llamafactory_sekd.evaluation.significance import Paired, is_significant, paired_bootstrap
from llamafactory_sekd.files import write_atomic
from llamafactory_sekd.reporting.document import Column, Document, Entry, Line, Passage, Plot, Section, Span, Table
from llamafactory_sekd.reporting.document import Row as TableRow
from llamafactory_sekd.reporting.html import render_html
from llamafactory_sekd.reporting.metric_labels import MARKS, number, p_text, significance_mark
from llamafactory_sekd.reporting.terminal import print_document


PLOTS = {
    "training_loss.png": "Loss of the Self-Evolution run (equation 9), as logged and smoothed",
    "training_kd.png": "Difficulty d and the share of hard tokens (d > Γ) in the same run",
}
EXAMPLES, EXAMPLE_WORDS = 5, 6

# Says what this setting can show, whatever comes out of one run of it; docs/demo.md has the figures of several seeds.
MEANING = (
    "At this size the demo shows the machine working, not the paper's ranking: two-layer students with 1.7 million "
    "parameters, one pass over the text, one seed, a thousand short strings. A † says that a difference is unlikely"
    " to come from the choice of these strings; another seed alone moves a student by about one BLEU. Self-"
    "Evolution KD may well come out behind here: the gradient of a hard token fades with the probability that the "
    "student gives to the ground truth, and about half of the tokens are hard for a student this weak. The paper's "
    "students are pretrained, with 7 billion parameters; examples/yamls/sekd_llama7b.yaml is the recipe to test its"
    " claims."
)
STORY = (
    "A teacher of four layers learned to translate Home Assistant's interface from English to German. A student that "
    "keeps its first and last layer was then trained three times, for the same number of steps on the same text: with "
    "plain SFT, with Forward KD, and with Self-Evolution KD. All of it ran through LLaMA-Factory's own commands."
)
GATE = (
    "d is how far the student is from the target that mixes ground truth and teacher (equation 5). Tokens above Γ = "
    "0.4 are hard and learned from an easier target (equation 7), the others from the target itself (equation 8)."
)
CHOICE = (
    "Not chosen for their quality: the first {} held-out sentences of at least six words. Words that differ from the "
    "reference are marked."
)
ORIGIN = (
    "Each command can be run again by itself. The evaluation's own report, with its guards and the sentences on which "
    "the systems differ most, is eval/report.html. Text: Home Assistant (Apache-2.0), translated by its community. "
    "BLEU: {}"
)
LABELS = {
    "student_untrained": ("Student, untrained", "the teacher's first and last layer, nothing more"),
    "student_sft": ("Student, SFT", "no teacher"),
    "forward_kl": ("Student, Forward KD", "kd_loss: forward_kl"),
    "self_evolution": ("Student, Self-Evolution KD", "kd_loss: self_evolution"),
    "teacher": ("Teacher, SFT", "all four layers"),
}


@dataclass(frozen=True)
class Row:
    """One system's scores. ``ci`` is half of BLEU's 95 % interval, ``p`` is against the baseline.

    The names with ``new`` are without the sentences that have a near-duplicate in training.
    """

    name: str
    bleu: float
    ci: float
    p: float | None
    significant: bool
    chrf: float
    similarity: float | None
    bleu_new: float
    ci_new: float
    p_new: float | None
    significant_new: bool

    @property
    def label(self) -> str:
        """Return the system's name in the report."""
        return LABELS.get(self.name, (self.name, ""))[0]

    @property
    def remark(self) -> str:
        """Return what the report says next to the name."""
        return LABELS.get(self.name, ("", ""))[1]


@dataclass(frozen=True)
class Example:
    """A held-out sentence, its reference, and (label, translation) per system."""

    source: str
    has_duplicate: bool
    reference: str
    outputs: list[tuple[str, str]]


@dataclass(frozen=True)
class Contents:
    """All that the report says; ``duplicates`` counts the sentences that have a near-duplicate in training."""

    baseline: str
    rows: list[Row]
    sentences: int
    duplicates: int
    examples: list[Example]
    signature: str

    @property
    def new(self) -> int:
        """Return how many test sentences are not in the training text."""
        return self.sentences - self.duplicates

    @property
    def baseline_label(self) -> str:
        """Return the baseline's name in the report."""
        return LABELS.get(self.baseline, (self.baseline, ""))[0]


def collect(
    results: Mapping[str, Any],
    hypotheses: Path,
    test_set: tuple[Sequence[str], Sequence[str]],
    training: Sequence[str],
) -> Contents:
    """Put the report's contents together.

    Args:
        results: the evaluation's results.json.
        hypotheses: the evaluation's folder of translations.
        test_set: sources and references.
        training: the sources that the models were trained on.
    """
    sources, references = test_set
    lines = {
        name: read_hypotheses(hypotheses / name / f"{DIRECTION}.txt", len(sources)) for name in results["systems"]
    }
    duplicates = near_duplicates(sources, training)
    new = [index for index, is_duplicate in enumerate(duplicates) if not is_duplicate]
    paired_new, bleu_new = _scores_of(new, lines, references, results["baseline"])
    return Contents(
        baseline=results["baseline"],
        rows=[_row(results, name, paired_new[name], bleu_new) for name in results["systems"]],
        sentences=len(sources),
        duplicates=sum(duplicates),
        examples=[
            Example(
                sources[index],
                duplicates[index],
                references[index],
                [(LABELS.get(name, (name, ""))[0], texts[index]) for name, texts in lines.items()],
            )
            for index in [i for i, source in enumerate(sources) if len(source.split()) >= EXAMPLE_WORDS][:EXAMPLES]
        ],
        signature=results["signatures"][str(DIRECTION)]["bleu"],
    )


def _scores_of(
    chosen: Sequence[int], lines: Mapping[str, Sequence[str]], references: Sequence[str], baseline: str
) -> tuple[dict[str, Paired], dict[str, float]]:
    """Score some of the sentences as the evaluation scores all of them: the paired tests, and BLEU, per system."""
    metric = surface_metric("bleu", DIRECTION.target)
    kept = {name: [texts[index] for index in chosen] for name, texts in lines.items()}
    kept_references = [references[index] for index in chosen]
    others = {name: texts for name, texts in kept.items() if name != baseline}
    paired, _ = paired_bootstrap(metric, kept_references, (baseline, kept[baseline]), others)
    return paired, {name: metric.corpus_score(texts, [kept_references]).score for name, texts in kept.items()}


def _row(results: Mapping[str, Any], name: str, paired_new: Paired, bleu_new: Mapping[str, float]) -> Row:
    direction, baseline = str(DIRECTION), results["baseline"]
    system = results["systems"][name]
    bleu = system["scores"][direction]["bleu"]
    paired = results["significance"][name][direction]["bleu"]
    return Row(
        name=name,
        bleu=bleu,
        ci=paired["ci"],
        p=paired["p"],
        significant=is_significant(paired["p"], bleu - results["systems"][baseline]["scores"][direction]["bleu"]),
        chrf=system["scores"][direction]["chrf"],
        similarity=(system["similarity"] or {}).get(direction),
        bleu_new=bleu_new[name],
        ci_new=paired_new.ci,
        p_new=paired_new.p,
        significant_new=is_significant(paired_new.p, bleu_new[name] - bleu_new[baseline]),
    )


def write_report(path: Path, contents: Contents, trained: Path, commands: Sequence[str]) -> None:
    """Write the report as one HTML file that loads nothing from elsewhere.

    Args:
        path: where it goes.
        contents: what it says.
        trained: the folder of the run whose plots are shown.
        commands: the commands that repeat the demo.
    """
    plots = tuple(
        Plot(Path(name).stem, caption, (trained / name).read_bytes(), b"") for name, caption in PLOTS.items()
    )
    repeat = Table(("step",), (Column("command", is_code=True),), tuple(map(_command, enumerate(commands, start=1))))
    document = Document(
        "A tiny translator, distilled",
        (("held-out sentences", f"{contents.sentences:,}"), ("direction", "English to German")),
        (
            Section("What it shows, and what not", STORY, alarm=MEANING),
            Section("Scores", _note(contents), tables=(_table(contents),)),
            Section("Training with Self-Evolution KD", GATE, plots=plots),
            Section("Five translations", CHOICE.format(len(contents.examples)), passages=_passages(contents)),
            Section("How this was made", ORIGIN.format(contents.signature), tables=(repeat,)),
        ),
    )
    write_atomic(path, render_html(document).encode("utf-8"))


def print_table(console: Console, contents: Contents) -> None:
    """Print the scores and what they mean."""
    title = f"{contents.sentences:,} held-out sentences, English to German"
    section = Section(title, _note(contents), tables=(_table(contents, brief=True),), main=True)
    print_document(Document(title, (), (section,)), console, notes=True)
    console.print(MEANING, highlight=False)


def _note(contents: Contents) -> str:
    share = f"{100 * contents.duplicates / contents.sentences:.0f}"
    return (
        f"BLEU (sacrebleu) with its 95 % interval (±) by a bootstrap with 1,000 samples; p is the paired "
        f"bootstrap's against {contents.baseline_label}. {MARKS}. The text is repetitive: {share} % of the "
        f"held-out sources have a near-duplicate in the training data (word Jaccard ≥ 0.6); “new” are the other "
        f"{contents.new:,}. “As teacher” is BLEU with the teacher's translations as references."
    )


def _table(contents: Contents, brief: bool = False) -> Table:
    """Return the scores; the ``brief`` table is made for 80 columns."""
    names = ("BLEU", "p", "BLEU, new", "p, new", "chrF2", "as teacher")
    base = next(row for row in contents.rows if row.name == contents.baseline)
    rows = []
    for row in contents.rows:
        entries = (
            _bleu(row.bleu, row.ci, row.significant, row.bleu - base.bleu),
            Entry(p_text(row.p)),
            _bleu(row.bleu_new, row.ci_new, row.significant_new, row.bleu_new - base.bleu_new),
            Entry(p_text(row.p_new)),
            Entry(number(row.chrf, 1)),
            Entry("–" if row.similarity is None else number(row.similarity, 1)),
        )
        role = "baseline" if row is base and not brief else ""
        kept = entries[:3] + entries[4:] if brief else entries
        rows.append(TableRow((row.name,) if brief else (row.label, row.remark), kept, role))
    shown = names[:3] + names[4:] if brief else names
    return Table(("system",) if brief else ("system", "trained with"), tuple(map(Column, shown)), tuple(rows))


def _bleu(value: float, ci: float, significant: bool, difference: float) -> Entry:
    return Entry(number(value, 1), number(ci, 1), significance_mark(difference, significant, 1))


def _passages(contents: Contents) -> tuple[Passage, ...]:
    return tuple(
        Passage(
            f"Sentence {place}" + (" (near-duplicate in training)" if example.has_duplicate else ""),
            (
                Line("source", (Span(example.source),), strong=True),
                Line("reference", (Span(example.reference),), strong=True),
                *(Line(label, differing(text, example.reference)) for label, text in example.outputs),
            ),
        )
        for place, example in enumerate(contents.examples, start=1)
    )


def _command(numbered: tuple[int, str]) -> TableRow:
    return TableRow((str(numbered[0]),), (Entry(numbered[1]),))
