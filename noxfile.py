"""The host versions that we support, each in an environment of its own: `make test-matrix`.

Every cell installs from the package registry, runs the smoke tests and records its outcome; the session `report`
writes docs/compatibility.md from these records. The cells of `matrix` install with constraints.txt, torch included,
apart from what they name; those of `newest` install what a user's `pip install` resolves to, one for each Python that
is there.
"""

from __future__ import annotations

import json
import os
import re
from datetime import date
from pathlib import Path

import nox


ROOT = Path(__file__).parent
RECORDS = ROOT / ".nox-records"
nox.options.sessions = ["matrix", "newest", "report"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"

# LLaMA-Factory 0.9.4 allows transformers up to 4.57.1, 0.9.5 up to 5.6.0; COMET needs transformers below 5.
CELLS = [
    ("0.9.4", "4.57.1", ""),
    ("0.9.4", "4.57.1", "comet"),
    ("0.9.5", "4.57.6", ""),
    ("0.9.5", "4.57.6", "comet"),
    ("0.9.5", "5.6.0", ""),
]
PYTHONS = ["3.11", "3.12", "3.13"]
TOOLS = ("pytest", "hypothesis", "hatchling", "deepspeed")
# What a cell chooses itself, or what follows from its choice.
FREE = {"llamafactory", "transformers", "tokenizers", "huggingface_hub", "hf-xet", "peft", "safetensors"}
SMOKE = {
    "stage": ["tests/trainer/test_training.py", "-k", "real_command or accumulation or resumed or host_s_sft"],
    "checks": ["tests/host/test_argument_checks.py"],
    "patches": ["tests/host/test_entry.py"],
    "eval": ["tests/evaluation/test_eval_command.py", "-k", "one_command or bad_input"],
    "comet": ["tests/evaluation/test_comet.py"],
}


def constraints_for(llamafactory: str, transformers: str) -> str:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if re.split(r"[=<>!~ ]", line)[0] not in FREE]
    return "\n".join([*kept, f"llamafactory=={llamafactory}", f"transformers=={transformers}"]) + "\n"


@nox.session
@nox.parametrize(("llamafactory", "transformers", "extra"), CELLS)
def matrix(session: nox.Session, llamafactory: str, transformers: str, extra: str) -> None:
    """One cell: install, then the smoke tests, each recorded."""
    RECORDS.mkdir(exist_ok=True)
    name = "-".join(filter(None, (llamafactory, transformers, extra)))
    constraints = RECORDS / f"{name}.constraints.txt"
    constraints.write_text(constraints_for(llamafactory, transformers), encoding="utf-8")
    # torch first, so that nothing asks for another build of it.
    session.install("-q", "-c", str(constraints), "torch", "torchvision", "torchaudio")
    extras = ",".join(filter(None, ("metrics", extra)))
    session.install("-q", "-c", str(constraints), "-e", f".[{extras}]", *TOOLS)
    _smoke(session, name, extra)


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """Install without constraints, as `pip install llamafactory-sekd` does, then the smoke tests."""
    RECORDS.mkdir(exist_ok=True)
    session.install("-q", "-e", ".[metrics]", *TOOLS)
    _smoke(session, f"newest-{session.python}", "")


def _smoke(session: nox.Session, name: str, extra: str) -> None:
    """Run the smoke tests of a cell that is installed, and record versions and outcomes."""
    installed = json.loads(session.run("python", "-m", "pip", "list", "--format=json", silent=True) or "[]")
    versions = {package["name"].lower(): package["version"] for package in installed}
    python = str(session.run("python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])", silent=True))
    record = {
        "python": python.strip(),
        "llamafactory": versions["llamafactory"],
        "transformers": versions["transformers"],
        "comet": versions.get("unbabel-comet", ""),
        "torch": versions["torch"],
        "numpy": versions["numpy"],
        "peft": versions["peft"],
        "measured": date.today().isoformat(),
        "outcomes": {},
    }
    for part, arguments in SMOKE.items():
        if part == "comet" and extra != "comet":
            continue

        if part == "eval" and extra != "comet":  # one bad input is a COMET checkpoint that is not there
            arguments = [*arguments[:-1], f"({arguments[-1]}) and not comet_model"]

        output = session.run(
            *("python", "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"),
            *arguments,
            env={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            success_codes=[0, 1],
            silent=True,
        )
        session.log(f"{part}: {str(output)[-4000:]}")
        record["outcomes"][part] = str(output).strip().splitlines()[-1]

    (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    failed = [part for part, summary in record["outcomes"].items() if "failed" in summary or "error" in summary]
    if failed:
        session.error(f"{name}: {', '.join(failed)}")


@nox.session(venv_backend="none")
def report(session: nox.Session) -> None:
    """Write docs/compatibility.md from the records."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob("*.json"))]
    parts = list(SMOKE)
    rows = []
    for record in records:
        head = [record["python"], record["llamafactory"], record["transformers"], record["comet"] or "not installed"]
        cells = [_shown(record["outcomes"].get(part)) for part in parts]
        rows.append([*head, record["torch"], record["numpy"], record["peft"], *cells, record.get("measured", "-")])

    titles = ["Python", "LLaMA-Factory", "transformers", "COMET", "torch", "numpy", "peft", *parts, "measured"]
    table = [titles, ["---"] * len(titles), *rows]
    page = (ROOT / "docs" / "compatibility.md.in").read_text(encoding="utf-8")
    page = page.replace("@TABLE@", "\n".join("| " + " | ".join(row) + " |" for row in table))
    (ROOT / "docs" / "compatibility.md").write_text(page, encoding="utf-8")
    session.log(f"{len(rows)} cells")


def _shown(summary: str | None) -> str:
    """`12 passed, 1 skipped` out of pytest's last line."""
    if summary is None:
        return "-"

    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", summary)
    return ", ".join(counts) or summary
