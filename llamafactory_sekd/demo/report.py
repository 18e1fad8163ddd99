"""The demo's report: the evaluation's scores, also without near-duplicates, the training plots, what it all means."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llamafactory_sekd.demo.data import DIRECTION, near_duplicates
from llamafactory_sekd.evaluation.hypotheses import read_hypotheses
from llamafactory_sekd.evaluation.scores import surface_metric
from llamafactory_sekd.evaluation.significance import Paired, is_significant, paired_bootstrap
from llamafactory_sekd.files import write_atomic


TEMPLATE = Path(__file__).with_name("report.html.j2")
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
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        contents=contents,
        meaning=MEANING,
        plots=[(base64.b64encode((trained / name).read_bytes()).decode(), caption) for name, caption in PLOTS.items()],
        commands=commands,
        p_text=p_text,
    )
    write_atomic(path, page.encode("utf-8"))


def print_table(console: Console, contents: Contents) -> None:
    """Print the scores and what they mean."""
    title = f"{contents.sentences:,} held-out sentences, English to German"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("system", no_wrap=True)
    for head in ("BLEU", "p", "BLEU, new", "chrF2", "as teacher"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in contents.rows:
        table.add_row(
            row.name,
            f"{row.bleu:.1f} ± {row.ci:.1f}{'†' if row.significant else ''}",
            p_text(row.p),
            f"{row.bleu_new:.1f} ± {row.ci_new:.1f}{'†' if row.significant_new else ''}",
            f"{row.chrf:.1f}",
            "–" if row.similarity is None else f"{row.similarity:.1f}",
        )
    console.print(table)
    share = f"{contents.duplicates / contents.sentences:.0%}"
    console.print(
        f"± 95 % interval; p and † (p < 0.05) against {contents.baseline}; new: the {contents.new:,} without a "
        f"near-duplicate in the training data ({share} have one); as teacher: BLEU against its translations.",
        style="dim",
        highlight=False,
    )
    console.print(MEANING, highlight=False)


def p_text(p: float | None) -> str:
    """Return p with three digits; the bootstrap of 1,000 samples knows nothing below 1/1001."""
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"
