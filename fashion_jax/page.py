"""Shareable pages: answers, figures, tables, flags and environment in one self-contained HTML file."""

import base64
import io
import json
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from markdown_it import MarkdownIt

from fashion_jax import report

if TYPE_CHECKING:
    import matplotlib.figure

# Nothing but tables is Markdown here: stars, links and tags in claims and names stay what they are.
_MARKDOWN = MarkdownIt("zero").enable("table")
# The policy holds browsers to what the module promises.
_HEAD = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">"""
# Figures have dark ink, so that they need a white card in the dark. Paper does not scroll.
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2125; --paper: #fff; --quiet: #59636e; --line: #d0d7de; --shade: #f3f5f7 }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
main { max-width: 60rem; margin: auto; padding: 1rem }
h1 { font-size: 1.6rem; line-height: 1.25 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); font-size: 1.3rem }
h3 { font-size: 1rem }
ul { padding-left: 1.2rem }
figure { margin: 1.5rem 0 }
img { box-sizing: border-box; max-width: 100%; max-height: 40rem; padding: 0.5rem; border-radius: 0.5rem }
img { display: block; background: #fff }
figcaption, dt { color: var(--quiet); font-size: 0.9rem }
.scroll { overflow-x: auto }
table { width: max-content; border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums }
th, td { max-width: min(16rem, 45vw); padding: 0.35rem 0.7rem; border: 1px solid var(--line); text-align: left }
td { vertical-align: top }
th { background: var(--shade) }
dl { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: 0.2rem 1rem; margin: 0 }
dd { min-width: 0; margin: 0 }
code { font-size: 0.85rem; overflow-wrap: anywhere; white-space: pre-wrap }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --paper: #16191d; --quiet: #9aa4ae; --line: #3d444d; --shade: #22272e }
}
@media print {
  body { font-size: 10pt }
  main { max-width: none; padding: 0 }
  h2, h3 { break-after: avoid }
  figure, tr, li { break-inside: avoid }
  img { max-height: 22cm; padding: 0 }
  .scroll { overflow: visible }
  table { width: auto; font-size: 8pt }
  th, td { max-width: none; padding: 0.1rem 0.3rem }
}
"""


def html(
    title: str,
    tables: Mapping[str, str],
    figures: Mapping[str, "matplotlib.figure.Figure"],
    *,
    about: Mapping[str, Any],
) -> str:
    """Return a page as the text of one HTML file, for screens of any width, light or dark, and for paper.

    The answers to claims come first, then the figures, first those whose names begin with "claims", then every table.

    Args:
        title: What the page is about, in a sentence.
        tables: Heading and text of each table: Markdown, as of `report.markdown` and `report.verdicts`, or a sentence.
        figures: Name and matplotlib Figure of each.
        about: How the results were made, such as flags and environment: a record for `report.as_json`.

    >>> answer = "| claim | answer | measured | p |\\n|---|---|---|---|\\n| it helps | supported | +0.1 | 0.01 |"
    >>> page = html("Does it help?", {"Accuracy:": answer}, {}, about={"seeds": 8})
    >>> "<h1>Does it help?</h1>" in page, "<li>it helps: <strong>supported</strong></li>" in page
    (True, True)
    """
    answers = {heading: _answers(text) for heading, text in tables.items()}
    drawn = sorted(figures, key=lambda name: not name.startswith("claims"))
    made = json.loads(report.as_json(about))
    sections = {
        "Answers": [_part(heading, listed) for heading, listed in answers.items() if listed],
        "Figures": [_figure(name, figures[name]) for name in drawn],
        "Tables": [_part(heading, _table(text)) for heading, text in tables.items()],
        "How it was made": [_part(name.capitalize(), _listed(value)) for name, value in made.items()],
    }
    filled = {name: "\n".join(parts) for name, parts in sections.items() if parts}
    body = "\n".join(f"<section>\n<h2>{name}</h2>\n{content}\n</section>" for name, content in filled.items())
    title = escape(title)
    head = f"{_HEAD}\n<title>{title}</title>\n<style>{_STYLE}</style>"
    body = f"<main>\n<h1>{title}</h1>\n{body}\n</main>"
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _part(heading: str, content: str) -> str:
    return f"<h3>{escape(heading.rstrip(':.'))}</h3>\n{content}"


def _answers(text: str) -> str:
    """Return claims and answers as a list, or nothing if the table is not one of verdicts."""
    tokens = _MARKDOWN.parse(text)
    cells = [token.content for token in tokens if token.type == "inline"]
    if cells[:2] != ["claim", "answer"]:
        return ""
    width = [token.type for token in tokens].count("th_open")
    pairs = zip(cells[width::width], cells[width + 1 :: width], strict=True)
    items = [f"<li>{escape(claim)}: <strong>{escape(answer)}</strong></li>" for claim, answer in pairs]
    return "\n".join(["<ul>", *items, "</ul>"])


def _figure(name: str, figure: "matplotlib.figure.Figure") -> str:
    texts = [text for axes in figure.axes for text in (axes.get_title(), axes.get_ylabel(), axes.get_xlabel())]
    alt = escape(": ".join(filter(None, [name, ", ".join(dict.fromkeys(filter(None, texts)))])))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    data = base64.b64encode(content.getvalue()).decode()
    caption = escape(name.replace("_", " ").capitalize())
    image = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
    return f"<figure>\n{image}\n<figcaption>{caption}</figcaption>\n</figure>"


def _table(text: str) -> str:
    # Those who have no pointer scroll what they can focus.
    return f'<div class="scroll" tabindex="0">\n{_MARKDOWN.render(text)}</div>'


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        names = [escape(name.replace("_", " ")) for name in value]
        entries = [
            f"<dt>{name}</dt><dd>{_listed(entry)}</dd>" for name, entry in zip(names, value.values(), strict=True)
        ]
        return "\n".join(["<dl>", *entries, "</dl>"])
    return f"<code>{escape(str(value)) or 'none'}</code>"
