"""The student's own samples of a run, as a table in the panel."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from llamafactory_sekd.webui.labels import element_labels, words


_COLUMNS = ("step", "source", "sample", "reference", "teacher_logprob")
_STEPS = 5  # the newest ones


def read_samples(output_dir: Path, steps: int = _STEPS) -> list[list[str]]:
    """Return a row for each sample of the newest steps that a run has written down, the newest first."""
    files = {
        int(found[1]): path
        for path in (output_dir / "samples").glob("step-*.jsonl")
        if (found := re.fullmatch(r"step-(\d+)", path.stem))
    }
    rows = []
    for step in sorted(files, reverse=True)[:steps]:
        for line in filter(None, files[step].read_text(encoding="utf-8").split("\n")):  # a sample may hold U+2028
            entry = {"step": step, **json.loads(line)}
            rows.append([_shown(entry.get(column)) for column in _COLUMNS])
    return rows


def build_samples_table(
    panel: gr.Accordion, inputs: Sequence[Any], output_dir: Callable[..., Path | None]
) -> dict[str, Any]:
    """Build a button and a table at the end of the panel, connect them, and return them by name.

    Args:
        panel: the accordion of our stage.
        inputs: the language's field, then those that ``output_dir`` reads.
        output_dir: from their values to the folder of the run; None where they name none.
    """
    with panel:
        button = gr.Button(**element_labels()["samples_btn"]["en"])
        table = gr.Dataframe(headers=_headers(None), value=[], visible=False, wrap=True, interactive=False)

    def show(language: str | None, *values: Any) -> gr.Dataframe:
        folder = output_dir(*values)
        rows = read_samples(folder) if folder is not None else []
        if not rows:
            gr.Info(words(language)["no_samples"])
        return gr.Dataframe(headers=_headers(language), value=rows, visible=bool(rows))

    button.click(show, list(inputs), [table], queue=False)
    return {"samples_btn": button, "samples_table": table}


def _headers(language: str | None) -> list[str]:
    texts = words(language)
    return [texts[f"sample_{column}"] for column in _COLUMNS]


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
