"""A page as a single offline HTML file, and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from urllib.parse import quote

from xattn.report.blocks import Block, Bullets, Heading, Page, Paragraph, Picture, Table

_STYLE = Path(__file__).with_name("page.css")


# If the page was moved, the run folders are not beside it, and links would lead nowhere.
_UNLINK = """<script>
if (!decodeURI(location.pathname).endsWith({here}))
  for (const link of document.querySelectorAll("td a")) link.replaceWith(link.textContent);
</script>
"""


def to_html(page: Page, svgs: Mapping[str, str], *, runs: str, here: str) -> str:
    """Return the page as one HTML file.

    svgs: picture name → SVG markup to embed. runs: the path from the page's folder to that of the run folders. here:
    the end of the page's path; if opened at another path, the page shows plain names instead of links.
    """
    body = "\n".join(_html(block, svgs, runs) for block in page.blocks)
    title = escape(page.title)
    unlink = _UNLINK.format(here=json.dumps(here).replace("<", "\\u003c"))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n'
        f"<style>\n{_STYLE.read_text('utf-8')}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n{unlink}</body>\n</html>\n"
    )


def to_markdown(page: Page) -> str:
    """Return the page as Markdown. Pictures are links to the SVG files beside it; run folders are named, not linked."""
    return "\n\n".join([f"# {page.title}", *(_markdown(block) for block in page.blocks)]) + "\n"


def _html(block: Block, svgs: Mapping[str, str], runs: str) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>"
        case Picture(name, caption):
            return f"<figure>\n{svgs[name]}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"
        case Table():
            return _html_table(block, runs)


def _html_table(table: Table, runs: str) -> str:
    wordy = (*table.words, *table.code, table.folders)
    kinds = [' class="words"' if column in wordy else "" for column in table.columns]
    head = "".join(f"<th{kind}>{escape(column)}</th>" for column, kind in zip(table.columns, kinds, strict=True))
    rows = []
    for row in table.rows:
        cells = []
        for column, kind, text in zip(table.columns, kinds, row, strict=True):
            inner = f"<code>{escape(text)}</code>" if column in table.code else escape(text)
            if column == table.folders:
                inner = f'<a href="{quote(runs)}/{quote(text, errors="surrogateescape")}/">{inner}</a>'
            cells.append(f"<td{kind}>{inner}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = "\n".join(rows)
    inner = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll" tabindex="0"><table>\n{inner}</table></div>{note}'


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Paragraph(text):
            return text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Picture(name, caption):
            return f"![{name}]({name}.svg)\n\n{caption}"
        case Table():
            return _markdown_table(block)


def _markdown_table(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rules = [":--" if column in (*table.words, *table.code, table.folders) else "--:" for column in table.columns]
    rows = []
    for row in table.rows:
        cells = []
        for column, text in zip(table.columns, row, strict=True):
            cell = text.replace("|", "\\|")
            cells.append(f"`{cell}`" if column in table.code and cell else cell)
        rows.append(line(cells))
    text = "\n".join([line(list(table.columns)), line(rules), *rows])
    return f"{text}\n\n{table.note}" if table.note else text
