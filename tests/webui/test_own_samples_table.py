"""The table of the student's own samples."""

from __future__ import annotations

import json

from llamafactory_sekd.webui.panel import read_samples


def test_the_newest_steps_come_first_and_a_sample_that_nobody_judged_has_a_dash(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    for step in (1, 2, 10):
        entries = [
            {"source": "a", "sample": f"b {step}", "reference": "c", "teacher_logprob": -1.234},
            {"source": "a", "sample": "d", "reference": "c", "teacher_logprob": None},
        ]
        (folder / f"step-{step}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    rows = read_samples(tmp_path, steps=2)
    assert [row[0] for row in rows] == ["10", "10", "2", "2"]
    assert rows[0] == ["10", "a", "b 10", "c", "-1.23"]
    assert rows[1][-1] == "–"
    assert read_samples(tmp_path / "other") == []
    entry = {"source": "a", "sample": "one\u2028line\x85only", "reference": "c", "teacher_logprob": None}
    (folder / "step-11.jsonl").write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row[0] for row in read_samples(tmp_path, steps=1)] == ["11"]


def test_the_page_shows_what_the_run_of_its_fields_wrote(tmp_path, monkeypatch):
    """The host's complete page is built, and the button's own function is called with the fields' values."""
    monkeypatch.chdir(tmp_path)
    from llamafactory.webui.interface import create_ui

    page = create_ui()
    [show] = [
        block.fn
        for block in page.fns.values()
        if getattr(block.fn, "__name__", "") == "show" and block.inputs and len(block.inputs) == 4
    ]
    folder = tmp_path / "saves" / "Custom" / "full" / "run" / "samples"
    folder.mkdir(parents=True)
    (folder / "step-3.jsonl").write_text(json.dumps({"source": "a", "sample": "b", "reference": "c"}) + "\n")
    shown = show("de", "Custom", "full", "run")
    assert shown.visible
    assert shown.value["data"] == [["3", "a", "b", "c", "–"]]
