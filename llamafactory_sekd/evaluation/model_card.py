"""What a model card says of a distillation and of the scores that an evaluation found.

Both are sections of the ``README.md`` that the host writes, between comments that Markdown does not show; the rest of
the card is left alone, so it can be edited and renewed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from llamafactory_sekd.data.languages import base_code
from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.files import read_json, write_atomic
from llamafactory_sekd.reporting.document import escape_markdown
from llamafactory_sekd.reporting.metric_labels import AVERAGE, metric_label, score_text


PAPER = (
    'Song et al., "Self-Evolution Knowledge Distillation for LLM-based Machine Translation", COLING 2025, '
    "[arXiv 2412.15303](https://arxiv.org/abs/2412.15303)"
)
TAGS = ("knowledge-distillation", "translation")
_TRAINING, _SCORES = "sekd: training", "sekd: scores"


def write_training(card: Path, opening: Sequence[str], datasets: Iterable[str]) -> None:
    """Tell in ``card`` how the model was distilled; ``opening`` is what the run said at its start."""
    section = [
        "## Knowledge distillation",
        "",
        "A frozen teacher has trained this model with llamafactory_sekd in LLaMA-Factory:",
        "",
        "```text",
        *(line.strip() for line in opening[1:]),
        "data       " + ", ".join(datasets),
        "```",
        "",
        f"The method is described in {PAPER}.",
    ]
    _renew(card, _TRAINING, section, {"tags": TAGS})


def write_scores(model: Path, save_dir: Path, system: str | None = None) -> str:
    """Tell in the card of ``model`` what the evaluation in ``save_dir`` found, and return the system's name.

    The system is the one that was made of this folder, or ``system``. Raises :class:`EvaluationError` where there is
    no such system, no model, or no evaluation.
    """
    if not any((model / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise EvaluationError(f"{model} holds no model: give the folder that training wrote.")
    results = read_json(save_dir / "results.json")
    if not isinstance(results, dict):
        raise EvaluationError(f"{save_dir} has no results.json: give the `save_dir` of an evaluation.")
    name = _system(model, results, system, save_dir)
    codes = [code for direction in results["directions"] for code in direction.split("-", 1)]
    languages = tuple(dict.fromkeys(base_code(code) for code in codes))
    _renew(model / "README.md", _SCORES, list(_score_lines(results, name)), {"tags": TAGS, "language": languages})
    return name


def _system(model: Path, results: Mapping[str, Any], asked: str | None, save_dir: Path) -> str:
    known = ", ".join(results["systems"])
    if asked is not None:
        if asked not in results["systems"]:
            raise EvaluationError(f"{save_dir} has no system {asked!r}, but {known}.")
        return asked
    own = [name for name, entry in results["systems"].items() if _is_at(entry.get("model") or {}, model)]
    if len(own) != 1:
        raise EvaluationError(f"{save_dir} does not say which system {model} is: pass --system, one of {known}.")
    return own[0]


def _is_at(arguments: Mapping[str, Any], model: Path) -> bool:
    places = (arguments.get("adapter_name_or_path"), arguments.get("model_name_or_path"))
    place = next((place for place in places if place), None)
    return place is not None and Path(place).resolve() == model.resolve()


def _score_lines(results: Mapping[str, Any], name: str) -> Iterable[str]:
    entry = results["systems"][name]
    metrics = [metric for metric in results["metrics"] if metric not in results["skipped"]]
    columns = [*results["directions"], *([AVERAGE] if len(results["directions"]) > 1 else [])]
    yield from (
        "## Translation quality",
        "",
        f"On {escape_markdown(results['task'])}, by `llamafactory-cli eval`:",
        "",
    )
    yield "| | " + " | ".join(metric_label(metric) for metric in metrics) + " |"
    yield "| --- |" + " ---: |" * len(metrics)
    for column in columns:
        cells = [_cell(results, name, entry["scores"][column][metric], column, metric) for metric in metrics]
        yield f"| {column} | " + " | ".join(cells) + " |"
    decoding = results["decoding"]
    beams = f"{decoding['num_beams']} beams" if decoding["num_beams"] > 1 else "greedy"
    yield from ("", f"Template {results['template']}, {beams}, at most {decoding['max_new_tokens']} new tokens.", "")
    yield from ("Signatures:", "")
    signatures: dict[str, list[str]] = {}
    for direction, by_metric in results["signatures"].items():
        for metric in metrics:
            if metric in by_metric:
                signatures.setdefault(f"{metric_label(metric)}: `{by_metric[metric]}`", []).append(direction)
    yield from (f"- {text} ({', '.join(directions)})" for text, directions in signatures.items())


def _cell(results: Mapping[str, Any], name: str, value: float | None, column: str, metric: str) -> str:
    if value is None:
        return "–"
    interval = results["significance"].get(name, {}).get(column, {}).get(metric, {}).get("ci")
    return score_text(metric, value) + (f" ± {score_text(metric, interval)}" if interval is not None else "")


def _renew(card: Path, mark: str, lines: Sequence[str], data: Mapping[str, Iterable[str]]) -> None:
    """Put a section in place of the one with the same mark, or at the end, and add to the card's data."""
    from huggingface_hub import ModelCard, ModelCardData

    content = card.read_text(encoding="utf-8") if card.is_file() else "---\n{}\n---\n"
    if not content.startswith("---"):
        content = "---\n{}\n---\n" + content
    found = ModelCard(content, ignore_metadata_errors=True)
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    section = "\n".join([begin, *lines, end])
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    text = (
        pattern.sub(lambda _: section, found.text)
        if pattern.search(found.text)
        else f"{found.text.rstrip()}\n\n{section}\n"
    )
    metadata = found.data.to_dict()
    for key, values in data.items():
        before = metadata.get(key) or []
        before = [before] if isinstance(before, str) else list(before)
        metadata[key] = list(dict.fromkeys([*before, *values]))
    kept = ModelCardData(**metadata, ignore_metadata_errors=True).to_yaml()
    write_atomic(card, f"---\n{kept}\n---\n{text.rstrip()}\n")


app = typer.Typer(help="Write the scores of an evaluation into a model's card.", add_completion=False)


@app.command()
def card(
    model: Annotated[Path, typer.Argument(help="The folder that training wrote.")],
    results: Annotated[Path, typer.Option("--results", help="The save_dir of an evaluation.")],
    system: Annotated[
        str | None, typer.Option("--system", help="The model's system in these results, where that is ambiguous.")
    ] = None,
) -> None:
    """Update the section on translation quality in MODEL/README.md; the rest of the card stays unchanged."""
    name = write_scores(model, results, system)
    print(f"{model / 'README.md'}: the scores of {name}")
