"""``sekd card``: the scores of an evaluation in a model's card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llamafactory_sekd.evaluation.model_card import write_scores


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
