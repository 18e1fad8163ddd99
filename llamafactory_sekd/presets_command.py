"""The command ``sekd objectives``: every preset with its equation, its keys, its source and its formula."""

from __future__ import annotations

from typing import Annotated

import typer

from llamafactory_sekd.arguments import DistillationArguments
from llamafactory_sekd.formula import DIVERGENCES, SIGNALS, TARGETS, unknown
from llamafactory_sekd.presets import PRESETS


app = typer.Typer(help="List the objectives that `kd_loss` can name.", add_completion=False)
_FORMULA = "L = 1/N Σ w · T² · D( y~ ‖ α q + (1-α) y~ ),   y~ = (1-λ) y + λ p"
_SYMBOLS = "q^ = β q + (1-β) y~,   d = KL(y~ ‖ q)"


@app.command()
def objectives(
    names: Annotated[list[str] | None, typer.Argument(help="Only these presets.", show_default=False)] = None,
) -> None:
    """List the presets with equation, keys, source and mapping, and the parts of a mapping."""
    for name in names or ():
        if name not in PRESETS:
            raise unknown("objectives", name, PRESETS)
    print(f"{_FORMULA}\n{_SYMBOLS}")
    for name in names or PRESETS:
        print("\n" + "\n".join(_lines(name)))
    if not names:
        print("\n" + "\n".join(_parts()))


def _lines(name: str) -> list[str]:
    preset = PRESETS[name]
    keys = {"kd_topk": 0.5} if "kd_topk" in preset.keys else {}
    rows = {
        "loss": preset.equation,
        "keys": ", ".join(sorted(preset.keys)),
        "source": preset.source,
        "mapping": f"kd_loss: {DistillationArguments(kd_loss=name, **keys).formula()}",  # type: ignore[arg-type]
    }
    return [name, *(f"  {title:<9}{text}" for title, text in rows.items())]


def _parts() -> list[str]:
    tables = {
        "target": TARGETS,
        "divergence": {name: text for name, (text, _) in DIVERGENCES.items()}
        | {"module:function": "your own, of (target, student), the value of every entry"},
        "signal of a gate": SIGNALS,
    }
    return [
        line
        for title, table in tables.items()
        for line in (title, *(f"  {name:<21}{text}" for name, text in table.items()))
    ]
