"""The comparison as HTML: three columns of colored tokens. Every text is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from llamafactory_sekd.webui.tokens.compare import Column, Comparison, Token


# Two hues that color-blind readers tell apart; hard tokens have a line below as well.
_HARD, _EASY = "217, 95, 2", "31, 119, 180"
_STYLE = """<style>
.sekd-view {color: var(--body-text-color); font-size: 14px}
.sekd-view p {margin: 4px 0}
.sekd-view .sekd-columns {display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 12px}
.sekd-view .sekd-column {min-width: 0; padding: 10px; border: 1px solid var(--border-color-primary);
  border-radius: 6px}
.sekd-view h4 {margin: 0 0 2px; font-size: 15px}
.sekd-view .sekd-name, .sekd-view .sekd-note {opacity: 0.75; overflow-wrap: anywhere}
.sekd-view .sekd-translation {overflow-wrap: anywhere; margin: 8px 0}
.sekd-view .sekd-tokens {display: flex; flex-wrap: wrap; gap: 3px; margin-top: 8px}
.sekd-view .sekd-token {display: inline-flex; flex-direction: column; align-items: center; padding: 1px 3px;
  border-radius: 3px; border-bottom: 3px solid transparent; white-space: pre-wrap; overflow-wrap: anywhere}
.sekd-view .sekd-hard {border-bottom-color: rgb(217, 95, 2); font-weight: 600}
.sekd-view .sekd-token small {font-size: 10px; font-weight: 400}
</style>"""


def render(comparison: Comparison, objective: str, words: Mapping[str, str]) -> str:
    """Return the HTML.

    Args:
        comparison: what to show.
        objective: the keys in words, such as `self_evolution, kd_lambda 0.5`.
        words: the view's words in the language of the page.
    """
    columns = {"before": comparison.before, "after": comparison.after, "teacher": comparison.teacher}
    strongest = max(token.difficulty for column in columns.values() for token in column.tokens)
    return "".join(
        [
            _STYLE,
            '<div class="sekd-view">',
            _line(words["source"], comparison.source),
            _line(words["reference"], comparison.reference),
            _line(words["objective"], objective),
            f'<p class="sekd-note">{_sample(words["hard"], True)} {_sample(words["easy"], False)} ',
            f"{escape(words['legend'])}</p>",
            '<div class="sekd-columns">',
            *(_column(words[role], column, strongest, words) for role, column in columns.items()),
            "</div></div>",
        ]
    )


def _line(name: str, text: str) -> str:
    return f"<p><b>{escape(name)}:</b> {escape(text)}</p>"


def _column(title: str, column: Column, strongest: float, words: Mapping[str, str]) -> str:
    summary = (
        f"{words['difficulty']} {column.mean_difficulty:.2f} · {words['hard_share']} {100 * column.hard_share:.0f} %"
    )
    return (
        f'<div class="sekd-column"><h4>{escape(title)}</h4><div class="sekd-name">{escape(column.name)}</div>'
        f'<p class="sekd-translation"><b>{escape(words["translation"])}:</b> {escape(column.translation)}</p>'
        f"<div>{escape(summary)}</div>"
        f'<div class="sekd-tokens">{"".join(_token(token, strongest, words) for token in column.tokens)}</div></div>'
    )


def _token(token: Token, strongest: float, words: Mapping[str, str]) -> str:
    strength = 0.08 + 0.5 * (token.difficulty / strongest if strongest > 0 else 0.0)
    title = (
        f"{words['hard'] if token.hard else words['easy']} · d {token.difficulty:.3f} · "
        f"−log q {token.student_ce:.3f} · −log p {token.teacher_ce:.3f}"
    )
    # A space would vanish at the edge of its box.
    text = escape(token.text.replace(" ", "\N{OPEN BOX}").replace("\n", "⏎")) or "&nbsp;"
    return (
        f'<span class="sekd-token{" sekd-hard" if token.hard else ""}" title="{escape(title)}" '
        f'style="background: rgba({_HARD if token.hard else _EASY}, {strength:.2f})">{text}'
        f"<small>{token.difficulty:.2f}</small></span>"
    )


def _sample(word: str, hard: bool) -> str:
    return (
        f'<span class="sekd-token{" sekd-hard" if hard else ""}" '
        f'style="background: rgba({_HARD if hard else _EASY}, 0.35)">{escape(word)}</span>'
    )
