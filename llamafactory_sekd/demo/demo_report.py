"""The demo's page. Every sentence about an outcome is made from the figures, whatever they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from llamafactory_sekd.data.noise import KINDS, Pair
from llamafactory_sekd.demo import data
from llamafactory_sekd.demo.references import MOST, Difficulties, References, measure
from llamafactory_sekd.evaluation.evaluation_report import differing, texts_table
from llamafactory_sekd.evaluation.significance import holm
from llamafactory_sekd.files import read_json, write_atomic
from llamafactory_sekd.reporting.document import (
    Column,
    Document,
    Entry,
    Line,
    Passage,
    Plot,
    Row,
    Section,
    Span,
    Table,
    render_html,
)
from llamafactory_sekd.reporting.figures import BASELINE, INK, canvas, finish
from llamafactory_sekd.reporting.metric_labels import number, p_text
from llamafactory_sekd.reporting.terminal import print_document
from llamafactory_sekd.study.matrix import expand
from llamafactory_sekd.study.report.cells import Difference, Group, Study, read_study
from llamafactory_sekd.study.report.score_plots import differences_plot
from llamafactory_sekd.study.report.training_sections import Histories, Runs, gate_plot
from llamafactory_sekd.study.report.views import Views, score_table
from llamafactory_sekd.study.spec import Spec
from llamafactory_sekd.study.study_results import JSON


START = "Student, before"
SELF_EVOLUTION = "Self-Evolution KD"
GAMMA = 0.4
EXAMPLES, EXAMPLE_WORDS = 5, 6
METRICS = {"bleu": "BLEU", "chrf": "chrF2"}

SETTING = (
    "A small translator learns English to German from {pairs:,} pairs of Home Assistant's interface. In {share:.0f} % "
    "of them the reference is wrong: {kind}. This noise was made for the demo; the held-out sentences and the "
    "teacher's own text are as the community wrote them. The teacher, four layers, learned from {teacher:,} other "
    "pairs; the student keeps its first and last layer. Sequence-level KD is SFT on the teacher's translations of "
    "{sources:,} English strings: those of the pairs, and {others:,} that have no usable German string. {sentences:,} "
    "held-out sentences decide. None of them has a "
    "near-duplicate in any text that was trained on (one whose set of words overlaps by {similarity:.0%} or more)."
)
LIMITS = (
    "Tiny models, short strings, one data set, noise of one kind: the page shows when distillation helps, not how "
    "much it helps elsewhere. Intervals are of the choice of held-out sentences; the dots are the seeds, which change "
    "the order of the text. p of the {count} comparisons below the picture is corrected together in each metric "
    "(Holm), that of the table's marks for the systems of the table."
)
GATE = (
    "d is how far the student is from the target that mixes ground truth and teacher (equation 5). Self-Evolution KD "
    "learns tokens above Γ = 0.4, the hard ones, from an easier target (equation 7), which pulls the less, the less "
    "the student believes the ground truth; the others from the target itself (equation 8). Forward KD at λ 1 listens "
    "to the teacher alone. All of them measure d with their own target."
)
APART = (
    "The same d, at λ 0.5, of the student's own text: the first {count} right and the first {count} wrong references, "
    "token by token. Whoever learns a wrong reference by heart makes it easy."
)
CHOICE = (
    "Not chosen for their quality: the first {} held-out sentences of at least six words, the first seed of each "
    "system. Words that differ from the reference are marked."
)
ORIGIN = (
    "Each command can be run again by itself. study/report.html has every figure of the comparison. Text: Home "
    "Assistant (Apache-2.0), translated by its community."
)


@dataclass(frozen=True)
class Contents:
    """Everything on the page: the study, the student's text and which of it is wrong, what models make of it."""

    views: Views
    noise: Mapping[str, Any]
    pairs: Sequence[Pair]
    teacher_pairs: int
    sources: int
    folders: Mapping[str, Path]

    @property
    def study(self) -> Study:
        """Return the study."""
        return self.views.study

    @property
    def column(self) -> str:
        """Return the direction."""
        return self.study.directions[0]

    @property
    def rows(self) -> tuple[Group, ...]:
        """Return the systems of the table: those that are only evaluated, then those that were trained."""
        return (*self.study.models, *self.study.groups)

    @property
    def distilled(self) -> tuple[Group, ...]:
        """Return the systems that have a teacher."""
        return tuple(group for group in self.study.groups if group.system != self.study.baseline)

    def comparisons(self) -> Iterator[tuple[Group, Group]]:
        """Yield what is tested: each distilled system against the baseline, Self-Evolution KD against the others."""
        baseline, own = self.named(str(self.study.baseline)), self.named(SELF_EVOLUTION)
        for other in (baseline, own):
            for group in self.distilled:
                if other is not None and group is not other:
                    yield (group, other) if other is baseline else (other, group)

    def named(self, system: str) -> Group | None:
        """Return the row of a system, None where it has no scores."""
        return next((group for group in self.rows if group.system == system), None)

    def score(self, system: str | None, metric: str) -> float | None:
        """Return a system's mean score."""
        group = self.named(str(system))
        summary = group.scores(self.column, metric) if group is not None else None
        return summary.mean if summary is not None else None


def collect(study: Path, text: Path, teacher: Path, start: Path) -> Contents:
    """Put together the contents of the page.

    Args:
        study: the study's folder.
        text: the folder of the data.
        teacher: the teacher's folder.
        start: the folder of the student's start.
    """
    found = read_study(read_json(study / JSON) or {}, study)
    first = {group.system: next(iter(group.cells.values())) for group in found.groups}
    folders = {START: start, **{system: study / cell["model"] for system, cell in first.items()}}
    return Contents(
        views=Views(found),
        noise=read_json(text / data.NOISE_FILE) or {},
        pairs=_pairs(text / f"{data.TRAIN}.json"),
        teacher_pairs=len(_pairs(text / f"{data.TEACHER}.json")),
        sources=len((text / data.MONOLINGUAL_FILE).read_text(encoding="utf-8").splitlines()),
        folders={"teacher": teacher, **folders},
    )


def write_page(path: Path, contents: Contents, spec: Spec, yamls: Path) -> None:
    """Write the page as one HTML file that loads nothing from elsewhere.

    Args:
        path: where it goes.
        contents: what it says.
        spec: the study.
        yamls: the folder of the YAML files that the demo ran.
    """
    students = {name: folder for name, folder in contents.folders.items() if name != "teacher"}
    references = measure(contents.pairs, contents.noise["wrong"], contents.folders["teacher"], students)
    commands = (
        f"llamafactory-cli train {yamls / 'demo_sft_teacher.yaml'}",
        f"sekd study {yamls / f'{spec.name}.yaml'}",
        *(
            f"llamafactory-cli train {contents.study.root / 'cells' / cell.folder.name / 'train.yaml'}"
            for cell in expand(spec)
        ),
    )
    document = Document(
        "A tiny translator, distilled from a text that is partly wrong",
        (
            ("held-out sentences", f"{_sentences(contents):,}"),
            ("direction", "English to German"),
            ("wrong references", f"{contents.noise['share']:.0%} ({contents.noise['kind']}, made)"),
        ),
        (
            scores_section(contents),
            Section("Hard tokens over training", GATE, plots=_gate(contents)),
            _references_section(references),
            Section("Five translations", CHOICE.format(EXAMPLES), passages=_passages(contents)),
            Section(
                "How this was made",
                ORIGIN,
                tables=(texts_table("Commands", ("step",), list(enumerate(commands, start=1))),),
            ),
        ),
    )
    write_atomic(path, render_html(document).encode("utf-8"))


def print_scores(console: Console, contents: Contents) -> None:
    """Print the scores and what they say."""
    section = scores_section(contents)
    title = f"{_sentences(contents):,} held-out sentences, English to German"
    shown = Section(title, section.note, tables=section.tables, main=True)
    print_document(Document(title, (), (shown,)), console, notes=True)
    for line in section.lines:
        console.print(line, highlight=False, markup=False)
    console.print(section.alarm, style="dim", highlight=False)


def scores_section(contents: Contents) -> Section:
    """Return the scores, the picture of them, and what they say."""
    study = contents.study
    note = SETTING.format(
        pairs=len(contents.pairs),
        share=100 * len(contents.noise["wrong"]) / len(contents.pairs),
        kind=KINDS[contents.noise["kind"]],
        teacher=contents.teacher_pairs,
        sources=contents.sources,
        others=contents.sources - len(contents.pairs),
        sentences=_sentences(contents),
        similarity=data.SIMILARITY,
    )
    table = score_table(study, contents.rows, contents.views.at_equal_settings)
    plot = differences_plot(contents.views, contents.rows, contents.views.at_equal_settings)
    return Section(
        "What came out",
        note,
        alarm=LIMITS.format(count=len(list(contents.comparisons()))),
        tables=(table,),
        plots=(plot,) if plot else (),
        lines=tuple(findings(contents)),
        main=True,
    )


def findings(contents: Contents) -> Iterator[str]:
    """Yield what the figures say, sentence by sentence."""
    baseline = str(contents.study.baseline)
    teacher = contents.named(str(contents.study.teacher))
    ahead = contents.views.at_equal_settings(teacher, contents.column, "bleu") if teacher is not None else None
    if ahead is not None:
        yield f"The teacher is {_told(ahead, 'BLEU')} {'above' if ahead.value > 0 else 'below'} {baseline}."
    before, after = (contents.score(name, "bleu") for name in (START, baseline))
    if before is not None and after is not None:
        yield f"{baseline} takes the student from {number(before, 1)} to {number(after, 1)} BLEU."
    for metric, label in METRICS.items():
        compared = list(contents.comparisons())
        found = {pair: contents.views.between(*pair, contents.column, metric) for pair in compared}
        known = {pair: one for pair, one in found.items() if one is not None}
        corrected = holm({pair: one.p for pair, one in known.items()})
        for (group, other), one in known.items():
            yield verdict(group.system, other.system, replace(one, p_holm=corrected[group, other]), label)
    yield from _ranking(contents)


def verdict(system: str, baseline: str, difference: Difference, label: str) -> str:
    """Return what a comparison says: better, worse, or that the sentences cannot tell."""
    p = difference.p_holm
    if not difference.significant:
        return f"{system} and {baseline} cannot be told apart: {_told(difference, label, sign=True)}, p = {p_text(p)}."
    place = "above" if difference.value > 0 else "below"
    return f"{system} is {_told(difference, label)} {place} {baseline}, p {_equals(p)}."


def _equals(p: float | None) -> str:
    text = p_text(p)
    return text if text.startswith("<") else f"= {text}"


def _told(difference: Difference, label: str, sign: bool = False) -> str:
    """Return a difference with its interval, without its sign where the words around it tell the direction."""
    low, high, value = difference.low, difference.high, difference.value
    if not sign and value < 0:
        low, high, value = -high, -low, -value
    return f"{number(value, 2, sign)} {label} ({number(low)} to {number(high)})"


def _ranking(contents: Contents) -> Iterator[str]:
    for metric, label in METRICS.items():
        means = {group.system: contents.score(group.system, metric) for group in contents.study.groups}
        known = {system: score for system, score in means.items() if score is not None}
        ordered = sorted(known, key=lambda system: -known[system])
        if ordered:
            yield f"By {label}: " + ", ".join(f"{system} {number(known[system], 1)}" for system in ordered) + "."


def _gate(contents: Contents) -> tuple[Plot, ...]:
    groups = contents.study.groups
    runs = Runs(
        {group: group.system for group in groups},
        dict.fromkeys(groups),
        {group: contents.views.looks[group.system] for group in groups},
        Histories(contents.study.root),
    )
    plot = gate_plot("", runs)
    return (plot,) if plot is not None else ()


def _references_section(references: References) -> Section:
    rows = [
        Row(
            (name,),
            (
                *(Entry(number(float(values.mean()))) for values in (one.right, one.wrong)),
                *(Entry(number(100 * float((values > GAMMA).mean()), 0)) for values in (one.right, one.wrong)),
            ),
        )
        for name, one in references.students.items()
    ]
    surprise = references.surprise
    teacher = (
        f"The teacher gives the tokens of a right reference a probability of {_typical(surprise.right)}, those of a "
        f"wrong one {_typical(surprise.wrong)} (geometric means)."
    )
    columns = [Column(kind, group) for group in ("mean d (nats)", "hard (%)") for kind in ("right", "wrong")]
    return Section(
        "Right and wrong references",
        f"{APART.format(count=MOST)} {teacher}",
        tables=(Table(("student",), tuple(columns), tuple(rows)),),
        plots=(_difficulty_plot(references),),
    )


def _typical(surprise: np.ndarray) -> str:
    return f"{np.exp(-surprise.mean()):.2g}"


def _difficulty_plot(references: References) -> Plot:
    """Draw how difficult the tokens of right and of wrong references are, for each student."""
    shown = references.students
    with canvas(len(shown), columns=2, height=2.1) as (figure, panels):
        for axes, (name, one) in zip(panels, shown.items(), strict=True):
            _draw_difficulties(axes, one)
            axes.set_title(name)
            axes.set_xlabel("d (nats)")
        panels[0].legend(frameon=False, fontsize=9)
        caption = "Difficulty d of the tokens of right and wrong references, in percent of each kind; the line is Γ."
        return finish(figure, "references", caption)


def _draw_difficulties(axes: Any, one: Difficulties) -> None:
    bins = np.linspace(0, 10, 41)
    for values, label, color, style in ((one.right, "right", INK, "-"), (one.wrong, "wrong", "#D55E00", "--")):
        weights = np.full(len(values), 100 / len(values))
        axes.hist(
            np.clip(values, 0, 10), bins, weights=weights, histtype="step", color=color, linestyle=style, label=label
        )
    axes.axvline(GAMMA, color=BASELINE, linewidth=1)


def _passages(contents: Contents) -> tuple[Passage, ...]:
    test_set = contents.views.texts.test_set(contents.column)
    long = [index for index, source in enumerate(test_set.sources) if len(source.split()) >= EXAMPLE_WORDS]
    texts = {
        group.system: contents.views.texts.hypotheses(next(iter(group.cells.values())), contents.column)
        for group in contents.rows
    }
    return tuple(
        Passage(
            f"Sentence {place}",
            (
                Line("source", (Span(test_set.sources[index]),), strong=True),
                Line("reference", (Span(test_set.references[index]),), strong=True),
                *(Line(name, differing(lines[index], test_set.references[index])) for name, lines in texts.items()),
            ),
        )
        for place, index in enumerate(long[:EXAMPLES], start=1)
    )


def _sentences(contents: Contents) -> int:
    return len(contents.views.texts.test_set(contents.column).sources)


def _pairs(path: Path) -> list[Pair]:
    return [(record["input"], record["output"]) for record in json.loads(path.read_text(encoding="utf-8"))]
