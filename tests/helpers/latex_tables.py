"""Reads a report's LaTeX as TeX would, as far as its tables go, and says what would not compile."""

from __future__ import annotations

import re


_TABULAR = re.compile(r"\\begin\{tabular\}\{([lrc]+)\}\n(.*?)\\end\{tabular\}", re.DOTALL)
_CELL = re.compile(r"(?<!\\)&")
_SPAN = re.compile(r"\s*\\multicolumn\{(\d+)\}")
# A command, a printed special character, or formulas and groups, which are looked at apart.
_KNOWN = re.compile(r"\\[A-Za-z]+|\\[&%$#_{}\\]")


def faults_of(tex: str) -> list[str]:
    """Return what would stop LaTeX: environments, braces, columns, characters that mean something to it."""
    lines = [line for line in tex.splitlines() if not line.startswith("%")]
    text = "\n".join(lines)
    faults = []
    open_ones: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            open_ones.append(name)
        elif not open_ones or open_ones.pop() != name:
            faults.append(f"\\end{{{name}}} ends nothing")
    faults += [f"{name} has no end" for name in open_ones]
    for line in lines:
        bare = _KNOWN.sub("", line)
        depth = 0
        for character in bare:
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth < 0:
                break
        if depth:
            faults.append(f"braces of {line!r}")
        if bare.count("$") % 2:
            faults.append(f"formulas of {line!r}")
        faults += [f"{character!r} in {line!r}" for character in '%#~^_"|<>' if character in _outside(bare)]
    for columns, body in _TABULAR.findall(text):
        for row in body.splitlines():
            if row.endswith(r" \\"):
                cells = _CELL.split(row.removesuffix(r" \\"))
                width = sum(int(found[1]) if (found := _SPAN.match(cell)) else 1 for cell in cells)
                if width != len(columns):
                    faults.append(f"{width} of {len(columns)} columns in {row!r}")
                if re.match(r"\s*[\[*]", row):
                    faults.append(f"an option of the row before in {row!r}")
            elif not re.fullmatch(r"\\(toprule|midrule|bottomrule)", row):
                faults.append(f"no row: {row!r}")
    return faults


def _outside(text: str) -> str:
    """The text without formulas."""
    return re.sub(r"\$[^$]*\$", "", text)
