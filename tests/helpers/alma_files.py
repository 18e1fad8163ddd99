"""A small corpus in the layout of ALMA's repository."""

from __future__ import annotations

import json
from pathlib import Path


# What a translation corpus can contain and a careless reader or prompt would damage.
TRICKY = [
    ("Guten Morgen!", "Good morning!"),
    ('Er sagte: „Ja“, dann \\n "nein".', "He said: “yes”, then \\n 'no'."),
    ("Die Variable {{idx}} und {{content}} bleiben.", "The variable {{idx}} and {{content}} {stay}."),
    ("### Response:", "### Input:"),
    ("Familie: 👩‍👩‍👧‍👦, Flagge: 🇩🇪, e\u0301 statt é", "Family: 👩‍👩‍👧‍👦, flag: 🇩🇪, e\u0301 not é"),
    ("100\u00a0% geschützt\u2009…", "100\u00a0% safe\u2009…"),
    ("שלום und مرحبا \u200fRTL", "שלום and مرحبا \u200fRTL"),
    ("𝕬 außerhalb der BMP 𐍈", "𝕬 outside the BMP 𐍈"),
    ("<s> kein Token </s>", "<s> no token </s>"),
]


def write_alma(root: Path, pairs: list[tuple[str, str]] | None = None, code: str = "de") -> Path:
    """Write train (JSON lines), valid and test (JSON lists) for one language; ``pairs`` are (foreign, English)."""
    pairs = TRICKY if pairs is None else pairs
    records = [{"translation": {code: foreign, "en": english}} for foreign, english in pairs]
    folder = root / "human_written_data" / f"{code}en"
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / f"train.{code}-en.json").write_text(lines, encoding="utf-8")
    for name in (f"valid.{code}-en", f"test.{code}-en", f"test.en-{code}"):
        (folder / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return root
