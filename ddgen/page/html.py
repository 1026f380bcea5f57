"""HTML of the report page: escaping, tables, figures, pictures as data; the page needs no network and no script."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

# Two columns of numbers fit a phone; what is wider scrolls inside its own box, never the page.
STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2126; --soft: #5b636d; --rule: #d8dce1; --faint: #eef0f3; --paper: #ffffff; --accent: #1f5fa8;
  --second: #b4541c; --third: #4c7a34; --fourth: #6d4a94; --bar: #9dbbe0; --wrong: #b02a2a; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e4e7ea; --soft: #a0a8b1; --rule: #3a4048; --faint: #23272d; --paper: #16191d; --accent: #7fb2ea;
  --second: #e59a66; --third: #9cc985; --fourth: #bda0e0; --bar: #3f6690; --wrong: #f08a80; } }
@media print { :root { color-scheme: light;
  --ink: #000; --soft: #444; --rule: #bbb; --faint: #f3f3f3; --paper: #fff; --accent: #1f5fa8;
  --second: #b4541c; --third: #4c7a34; --fourth: #6d4a94; --bar: #9dbbe0; --wrong: #b02a2a; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-behavior: auto; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 1.0625rem/1.6 Charter, "Bitstream Charter", "Source Serif 4", Cambria, Georgia, "DejaVu Serif", serif; }
header, main, footer { max-width: 60rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 3rem; }
p, ul.plain, dl { max-width: 44rem; }
h1, h2, h3, h4 { line-height: 1.25; font-weight: 600; text-wrap: balance; }
h1 { font-size: clamp(1.6rem, 1.2rem + 2vw, 2.25rem); margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.4rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1.25rem 0 .35rem; }
p { margin: .5rem 0 .9rem; }
.lead { font-size: 1.15rem; color: var(--soft); }
.note, figcaption, caption, footer, nav, table, dl, code, pre, .images, summary, svg text {
  font-family: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Open Sans", "DejaVu Sans", sans-serif; }
.note, figcaption, footer { font-size: .86rem; line-height: 1.5; color: var(--soft); }
a { color: var(--accent); text-underline-offset: .15em; text-decoration-thickness: 1px; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; padding: 0; margin: 1.25rem 0 0;
  font-size: .92rem; }
nav a { display: inline-block; padding: .2rem 0; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4; font-variant-numeric: tabular-nums;
  min-width: min(100%, 26rem); }
caption { text-align: left; color: var(--soft); font-size: .86rem; padding-bottom: .4rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(44rem, calc(100vw - 2.5rem)); }
thead th:first-child, tbody th { position: sticky; left: 0; background: var(--paper); }
th, td { padding: .38rem 1.1rem .38rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th:last-child, td:last-child { padding-right: 0; }
thead th { border-bottom: 1.5px solid var(--soft); vertical-align: bottom; font-weight: 600; }
tbody th { font-weight: 400; }
tr.ours th, tr.ours td { font-weight: 650; }
tr.ours small { font-weight: 400; }
.number { text-align: right; white-space: nowrap; }
td small, th small { display: block; color: var(--soft); font-size: .78rem; }
.bar { display: block; height: 3px; margin: .22rem 0 .1rem auto; min-width: 5rem; background: var(--faint);
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.bar i { display: block; height: 100%; background: var(--bar); }
tr.ours .bar i { background: var(--accent); }
.shade { display: block; margin: -.1rem -.5rem -.1rem 0; padding: .1rem .5rem; print-color-adjust: exact;
  background: color-mix(in srgb, var(--bar) var(--part), transparent); }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .3rem 1.25rem; font-size: .9rem;
  line-height: 1.45; margin: .5rem 0 1rem; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .84em; }
pre { background: var(--faint); padding: .8rem 1rem; margin: .5rem 0 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere; border-radius: 3px; line-height: 1.55; font-size: .8rem; }
code { overflow-wrap: anywhere; }
figure { margin: 1rem 0 1.5rem; }
figure > img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 2px; }
figcaption { max-width: 44rem; margin-top: .45rem; }
figure.curve > svg { display: block; width: 100%; max-width: 36rem; height: auto; color: var(--ink); }
figure.panels > div { display: grid; gap: .5rem 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); }
figure.panels svg { display: block; width: 100%; height: auto; color: var(--ink); }
.key { white-space: nowrap; margin-right: .9rem; }
.key svg { vertical-align: middle; margin-right: .35rem; }
.images { list-style: none; margin: .2rem 0 .2rem; padding: 0; display: grid; gap: .5rem;
  grid-template-columns: repeat(auto-fill, minmax(4.1rem, 1fr)); }
.images img { display: block; width: 100%; height: auto; background: var(--faint); }
.images img.small { image-rendering: pixelated; }
.images span { display: block; text-align: center; font-size: .74rem; line-height: 1.5; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.images .other { color: var(--wrong); }
.class { display: grid; grid-template-columns: 8.5rem 1fr; gap: .2rem 1rem; padding: .6rem 0;
  border-bottom: 1px solid var(--rule); break-inside: avoid; }
.class h4 { margin: 0; font-size: .9rem; font-family: inherit; overflow-wrap: anywhere; }
@media (max-width: 42rem) { .class { grid-template-columns: 1fr; }
  .images { grid-template-columns: repeat(auto-fill, minmax(3.4rem, 1fr)); }
  .images.pairs { grid-template-columns: repeat(6, 1fr); } }
details { margin: .5rem 0 1rem; }
summary { cursor: pointer; font-size: .9rem; color: var(--accent); padding: .25rem 0; }
footer { margin-top: 3rem; padding-top: 1rem; padding-bottom: 3rem; }
@page { margin: 18mm 16mm; }
@media print {
  html { font-size: 9pt; } header { padding-top: 0; } nav { display: none; } h2 { margin-top: 1.5rem; }
  h2, h3, h4 { break-after: avoid; } figure, tr, pre { break-inside: avoid; } .scroll { overflow: visible; }
  .images { grid-template-columns: repeat(10, 1fr); }
  details::details-content { content-visibility: visible; display: block; block-size: auto; }
  a { color: inherit; text-decoration: none; }
}
"""


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        html: Its content, escaped.
        number: Whether it is set to the right.
    """

    html: str
    number: bool = False


def esc(value: object) -> str:
    """Returns text that is safe in HTML, between tags and inside quoted attributes."""
    return html.escape(str(value), quote=True)


def text(value: object) -> Cell:
    """Returns a cell of text."""
    return Cell(esc(value))


def number(value: object, below: str = "") -> Cell:
    """Returns a cell of a number, with a smaller line below it."""
    return Cell(esc(value) + (f"<small>{esc(below)}</small>" if below else ""), number=True)


def table(
    caption: str, header: Sequence[Cell], rows: Iterable[Sequence[Cell]], ours: frozenset[int] = frozenset()
) -> str:
    """Returns a table in a box that scrolls sideways where the page is too narrow.

    Args:
        caption: What it shows, plain text.
        header: Of each column.
        rows: The first cell heads its row.
        ours: Numbers of the rows that stand out.
    """
    head = "".join(f'<th scope="col"{_number(cell)}>{cell.html}</th>' for cell in header)
    body = "\n".join(
        ('<tr class="ours">' if index in ours else "<tr>")
        + f'<th scope="row"{_number(row[0])}>{row[0].html}</th>'
        + "".join(f"<td{_number(cell)}>{cell.html}</td>" for cell in row[1:])
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return (
        f'<div class="scroll" role="region" aria-label="{esc(caption)}" tabindex="0"><table>\n'
        f"<caption><span>{esc(caption)}</span></caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def definitions(pairs: Iterable[tuple[str, object]]) -> str:
    """Returns a list of names and values; nothing where all values are None or empty."""
    rows = [f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in pairs if value not in (None, "")]
    return "<dl>\n" + "\n".join(rows) + "\n</dl>" if rows else ""


def paragraph(content: str, kind: str = "") -> str:
    """Returns a paragraph of plain text."""
    opening = f'<p class="{kind}">' if kind else "<p>"
    return f"{opening}{esc(content)}</p>"


def figure(data: str, alt: str, caption: str, size: tuple[int, int]) -> str:
    """Returns a picture with its caption.

    Args:
        data: See `data_uri`.
        alt: What it shows, for those who do not see it.
        caption: Plain text.
        size: Width and height in pixels.
    """
    width, height = size
    return (
        f'<figure><img src="{data}" alt="{esc(alt)}" width="{width}" height="{height}">'
        f"<figcaption>{esc(caption)}</figcaption></figure>"
    )


def data_uri(image: Image.Image, *, lossless: bool) -> str:
    """Returns a picture as an address that holds its content: a PNG, or a JPEG of quality 85."""
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, format="PNG", compress_level=9)
    else:
        image.convert("RGB").save(buffer, format="JPEG", quality=85, optimize=True)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def section(name: str, title: str, parts: Sequence[str]) -> str:
    """Returns a section that the contents can point to; nothing where all parts are empty."""
    content = "\n".join(part for part in parts if part)
    if not content:
        return ""
    opening = f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">'
    return f"{opening}{esc(title)}</h2>\n{content}\n</section>"


def document(title: str, lead: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """Returns the page.

    Args:
        title: Plain text.
        lead: First sentences, plain text.
        sections: Name, title and HTML of each; empty ones are left out.
        footer: Plain text.
    """
    there = [(name, heading, content) for name, heading, content in sections if content]
    links = "".join(f'<li><a href="#{name}">{esc(heading)}</a></li>' for name, heading, _ in there)
    main = "\n".join(content for *_, content in there)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{esc(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{esc(title)}</h1>
<p class="lead">{esc(lead)}</p>
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main>
{main}
</main>
<footer><p class="note">{esc(footer)}</p></footer>
</body>
</html>
"""


def _number(cell: Cell) -> str:
    return ' class="number"' if cell.number else ""
