"""What MkDocs cannot take from `docs/` as it is: pages of the top folder, made pages, and links between them.

The pages are written for the repository's own web page; this gives the same files to the site without a second copy.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from llamafactory_sekd.arguments import DistillationArguments, keys_read_by
from llamafactory_sekd.presets import PRESETS


REPOSITORY = Path(__file__).parents[2]
# Page of the site -> file of the top folder.
TOP_PAGES = {"index.md": "README.md", **{name: name for name in ("AGENTS.md", "CONTRIBUTING.md", "CHANGELOG.md")}}
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
_FILE_AS_TEXT = re.compile(r"\[(?:docs/)?(\w+)\.md\]\(")
_MATH = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)  # as the repository's web page renders it, too
_SOURCE_LINK = re.compile(r"\[([^\]]+)\]\((?:\.\./)*llamafactory_sekd/[^)]+\)")  # the site has no source files
_KINDS = {int: "integer", float: "number", str: "text", bool: "true or false"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in `docs/`."""
    made = {page: (REPOSITORY / source).read_text(encoding="utf-8") for page, source in TOP_PAGES.items()}
    made["keys.md"] = keys_page()
    for path in sorted((REPOSITORY / "examples").glob("**/*.yaml")):
        made[path.relative_to(REPOSITORY).with_suffix(".md").as_posix()] = _example_page(path)
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links between files of the repository lead to the pages of the site."""
    page_name = page.file.src_uri
    source = TOP_PAGES.get(page_name, f"docs/{page_name}")
    markdown = _MATH.sub(lambda match: convert(match[1].strip(), display="block"), markdown)
    markdown = _SOURCE_LINK.sub(lambda match: f"`{match[1]}`", markdown)
    named = _FILE_AS_TEXT.sub(lambda match: f"[{match[1].replace('_', ' ').capitalize()}](", markdown)
    return _LINK.sub(lambda match: _site_link(match[1], source, page_name), named)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Name the theme's search dialog for screen readers."""
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"')


def _site_link(link: str, source: str, page: str) -> str:
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    names = {top: name for name, top in TOP_PAGES.items()}
    if target.startswith("examples/") and target.endswith(".yaml"):
        target = target.removesuffix(".yaml") + ".md"
    elif target.startswith("docs/"):
        target = target.removeprefix("docs/")
    elif target in names:
        target = names[target]
    else:
        return link  # leads out of the site: the strict build names it
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def _example_page(path: Path) -> str:
    name = path.relative_to(REPOSITORY).as_posix()
    return f"# {path.name}\n\n`{name}`\n\n```yaml\n{path.read_text(encoding='utf-8')}```\n"


def keys_page() -> str:
    """Every key of the stage, from `arguments.py`: type, default, readers, help with range and equation."""
    items = fields(DistillationArguments)
    hints = get_type_hints(DistillationArguments)
    lines = [
        "# Every key",
        "",
        "The keys that `stage: sekd` adds to a training YAML; all others are LLaMA-Factory's. The page is made from",
        "`arguments.py`, as are the host's help and the labels of the web UI. Symbols and equations:",
        "[Objectives](objectives.md).",
        "",
        "| key | type | default | read by |",
        "|---|---|---|---|",
        *(f"| [`{i.name}`](#{i.name}) | {_kind(hints[i.name])} | {_default(i)} | {_readers(i.name)} |" for i in items),
        "",
        "## The objectives",
        "",
        "| `kd_loss` | loss of a token | keys that it reads in addition to the common ones |",
        "|---|---|---|",
        *(f"| `{name}` | {preset.equation} | {_names(sorted(preset.keys))} |" for name, preset in PRESETS.items()),
        "",
        "## The keys",
        "",
    ]
    for item in items:
        text = item.metadata["help"] if item.name != "kd_loss" else "The distillation objective, see above."
        lines += [
            f"### `{item.name}` {{ #{item.name} }}",
            "",
            f"{_kind(hints[item.name])} · default: {_default(item) or 'none'} · read by {_readers(item.name)}",
            "",
            text,
            "",
        ]
    return "\n".join(lines)


def _kind(hint: Any) -> str:
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    return " or ".join(_KINDS.get(kind, str(kind)) for kind in kinds)


def _default(item: Field[Any]) -> str:
    if item.default is None or item.default is MISSING:
        return ""
    return f"`{str(item.default).lower() if isinstance(item.default, bool) else item.default}`"  # as YAML writes it


def _readers(key: str) -> str:
    if not key.startswith("kd_"):
        return "every run"
    readers = [name for name in PRESETS if key in keys_read_by(name)]
    return "every objective" if len(readers) == len(PRESETS) else _names(readers)


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
