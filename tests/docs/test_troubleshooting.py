"""What the troubleshooting page quotes is what the programs say."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### (.+)$", PAGE, flags=re.MULTILINE)
PLACE = "\0"  # where a message is filled in


def text_of(node: ast.JoinedStr | ast.Constant) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    known = {"STAGE": "sekd", "SELF": "self"}
    return "".join(
        text_of(part)
        if isinstance(part, ast.Constant)
        else known.get(ast.unparse(part.value) if isinstance(part, ast.FormattedValue) else "", PLACE)
        for part in node.values
    )


@cache
def messages() -> list[str]:
    """Every text in the package and in the parser that the host uses."""
    parser = find_spec("transformers.hf_argparser")
    assert parser
    assert parser.origin
    sources = [*(REPOSITORY / "llamafactory_sekd").rglob("*.py"), Path(parser.origin)]
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in sources)
    strings = (node for tree in trees for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.Constant)))
    return [text_of(node) for node in strings if isinstance(node, ast.JoinedStr) or isinstance(node.value, str)]


def test_the_page_quotes_messages_of_every_room():
    assert len(QUOTED) >= 30
    assert len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_is_one_that_the_source_holds(quoted):
    # `…` marks what is filled in, and for fixed text that the page leaves out.
    pattern = re.compile(".+".join(re.escape(piece) for piece in quoted.split("…")), flags=re.DOTALL)
    assert len(quoted.replace("…", "")) >= 20, "too little fixed text to be found by"
    assert any(pattern.search(message) for message in messages()), quoted
