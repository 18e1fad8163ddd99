"""``report.tex`` compiles, whatever systems, metrics and keys are called."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.latex_tables import faults_of

from llamafactory_sekd.reporting.document import Column, Document, Entry, Row, Section, Table, render_latex


LATIN = (
    r"100 % & {a}_b#$c\d~^ --lr=1e-5 ‘x’ ”y” `z` \"ä",
    "[in brackets] Größe",
    "*starred* łódź ÇÑéß",
    "† and ▾ | <b> → · Γ = 0.4, β ≥ 1 × 2 ‖ …",
    "two\nlines",
    "a-b – c — d",
)
FOREIGN = (*LATIN, "教师模型", "学生 (SKEW)")


def document(names: tuple[str, ...]) -> Document:
    """Tables whose every text has these names in it: with groups of columns, without, and without any figure."""
    entries = (Entry("31.4", "0.2", "†", "+1.0", best=True), Entry("−0.5", small="<0.001", mark="▾"), Entry("≤ 50 %"))
    columns = tuple(Column(name, group) for name, group in zip(names, (names[0], names[0], ""), strict=False))
    rows = tuple(Row((name, name), entries, "baseline") for name in names)
    plain = Table(("system",), tuple(Column(name) for name in names[:3]), tuple(Row((n,), entries) for n in names))
    tables = (Table(("system", names[1]), columns, rows, title=names[-1]), plain, Table((names[0],), (), ()))
    return Document(names[0], (), (Section(names[1], " ".join(names), tables=tables, main=True),))


@pytest.mark.parametrize("names", [LATIN, FOREIGN], ids=["latin", "foreign"])
def test_every_name_is_escaped_and_every_row_has_all_columns(names: tuple[str, ...]) -> None:
    tex = render_latex(document(names))
    assert faults_of(tex) == []
    assert tex.count(r"\begin{tabular}") == 3
    assert r"100 \% \& \{a\}\_b\#\$c\textbackslash{}d" in tex
    assert r"-{}-lr=1e-5" in tex
    assert r"{[}in brackets{]}" in tex


def test_the_check_itself_finds_what_does_not_compile() -> None:
    good = render_latex(document(LATIN))
    for right, wrong in (
        (r"\%", "%"),
        (" & ", " "),
        (r"\end{tabular}", ""),
        ("{[}", "["),
        (r"\_", "_"),
        ("$-$", "$-"),
    ):
        assert right in good
        assert faults_of(good.replace(right, wrong)), wrong


def test_the_preamble_that_the_file_needs_is_in_its_first_lines() -> None:
    ascii_only = render_latex(document(("a", "b", "c")))
    assert ascii_only.startswith("% Needs \\usepackage{booktabs} and \\usepackage{amssymb}.\n\n")
    assert r"\usepackage[T1]{fontenc}" in render_latex(document(LATIN)).splitlines()[0]
    foreign = render_latex(document(FOREIGN)).splitlines()
    assert foreign[1] == "% Characters beyond Latin: 教师模型学生"
    assert "CJKutf8" in foreign[3]


@pytest.mark.parametrize("names", [LATIN, FOREIGN], ids=["latin", "foreign"])
def test_pdflatex_compiles_it(names: tuple[str, ...], tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex on PATH: apt-get install texlive-latex-recommended latex-cjk-chinese")
    tex = render_latex(document(names))
    packages = re.findall(r"\\usepackage(?:\[\w+\])?\{\w+\}", tex)
    styles = [re.search(r"\{(\w+)\}", package)[1] for package in packages]
    missing = [style for style in styles if not found(f"{style}.sty")]
    if missing:
        pytest.skip(f"this TeX has no {', '.join(missing)}")
    start, end = (r"\begin{CJK*}{UTF8}{gbsn}", r"\end{CJK*}") if "CJKutf8" in styles else ("", "")
    (tmp_path / "report.tex").write_text(tex, encoding="utf-8")
    lines = [
        r"\documentclass{article}",
        *packages,
        r"\begin{document}",
        start,
        r"\input{report}",
        end,
        r"\end{document}",
    ]
    (tmp_path / "paper.tex").write_text("\n".join(lines), encoding="utf-8")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Missing character" not in (tmp_path / "paper.log").read_text(encoding="utf-8", errors="replace")


def found(file: str) -> bool:
    return bool(subprocess.run(["kpsewhich", file], capture_output=True, text=True, timeout=60).stdout.strip())
