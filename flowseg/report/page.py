"""A self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from flowseg.runs.files import write_whole

_STYLE = """
body { margin: 0; background: #f4f5f7; color: #1d2430; font: 16px/1.55 system-ui, "Segoe UI", Helvetica, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 0 0 .6rem; }
.lead { color: #4a5567; max-width: 46rem; margin: 0 0 1.6rem; }
section { background: #fff; border: 1px solid #e2e5ea; border-radius: 10px; padding: 1.4rem 1.5rem; margin: 0 0 1.4rem;
}
section p { max-width: 48rem; }
img { max-width: 100%; height: auto; display: block; margin: .4rem auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: .9rem; margin: 0 0 1.4rem; }
.card { background: #fff; border: 1px solid #e2e5ea; border-radius: 10px; padding: .9rem 1.1rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card span { color: #4a5567; font-size: .86rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 24rem; }
th, td { text-align: left; padding: .38rem .9rem .38rem 0; border-bottom: 1px solid #e8eaee; }
th { font-weight: 600; color: #4a5567; font-size: .88rem; }
td.number, th.number { text-align: right; }
pre { background: #f4f5f7; border-radius: 8px; padding: .9rem 1rem; overflow-x: auto;
      font-size: .84rem; line-height: 1.45; }
summary { cursor: pointer; color: #1f5fa8; }
input[type=search] { font: inherit; padding: .3rem .6rem; border: 1px solid #c9ced6; border-radius: 6px; min-width: 16rem; }
footer { color: #6b7585; font-size: .85rem; }
"""

# Shows the rows whose first cell contains the text of the search box, at most %d of them.
_SEARCH = """
(() => {
  const data = document.currentScript.previousElementSibling, box = data.parentElement, most = %d;
  const rows = JSON.parse(data.textContent), input = box.querySelector('input');
  const body = box.querySelector('tbody'), note = box.querySelector('span');
  const line = (cells) => {
    const row = document.createElement('tr');
    cells.forEach((text, place) => {
      const cell = document.createElement('td');
      if (place) cell.className = 'number';
      cell.textContent = text;
      row.append(cell);
    });
    return row;
  };
  input.addEventListener('input', () => {
    const word = input.value.trim().toLowerCase();
    const found = rows.filter((row) => row[0].toLowerCase().includes(word));
    body.replaceChildren(...found.slice(0, most).map(line));
    note.textContent = Math.min(most, found.length) + ' of ' + found.length;
  });
})();
"""


class Page:
    """A report, built from top to bottom. All texts are escaped.

    Args:
        title: title of the page.
        lead: sentence below the title.
    """

    def __init__(self, title: str, lead: str):
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1><p class='lead'>{html.escape(lead)}</p>"]

    def cards(self, cards: Sequence[tuple[str, str]]) -> None:
        """Add a row of large numbers, given as ``(number, meaning)``."""
        inner = "".join(
            f"<div class='card'><b>{html.escape(n)}</b><span>{html.escape(w)}</span></div>" for n, w in cards
        )
        self._parts.append(f"<div class='cards'>{inner}</div>")

    def section(self, title: str, *blocks: str) -> None:
        """Add a box with a title and blocks that the functions below made."""
        self._parts.append(f"<section><h2>{html.escape(title)}</h2>{''.join(blocks)}</section>")

    def write(self, path: Path) -> None:
        """Write the page to a file."""
        text = (
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>"
            f"<body><main>{''.join(self._parts)}</main></body></html>\n"
        )
        write_whole(path, text, errors="backslashreplace")


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def picture(figure: Figure, alt: str, dpi: int = 130) -> str:
    """A figure as an embedded PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"<img alt='{html.escape(alt, quote=True)}' src='data:image/png;base64,{data}'>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns except the first are numbers."""
    kind = ["", *[" class='number'"] * (len(header) - 1)]
    head = "".join(f"<th{k}>{html.escape(cell)}</th>" for k, cell in zip(kind, header))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{html.escape(cell)}</td>" for k, cell in zip(kind, row)) + "</tr>" for row in rows
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def search_table(header: Sequence[str], rows: Sequence[Sequence[str]], shown: int = 100) -> str:
    """A table with a search box for the first column.

    The page contains all rows, and shows the first ``shown`` of those that contain the text in the box. Without JavaScript it
    shows the first rows.
    """
    # In a script element only "<" could end the data.
    data = json.dumps(list(map(list, rows)), separators=(",", ":")).replace("<", "\\u003c")
    word = html.escape(header[0], quote=True)
    return (
        f"<div><p><input type='search' placeholder='{word}' aria-label='{word}'> "
        f"<span>{min(shown, len(rows))} of {len(rows)}</span></p>{table(header, rows[:shown])}"
        f"<script type='application/json'>{data}</script><script>{_SEARCH % shown}</script></div>"
    )


def folded(summary: str, text: str) -> str:
    """Preformatted text that a click on ``summary`` shows."""
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"
