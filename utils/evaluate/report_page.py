"""One HTML page that reports a run: figures inside it, tables, and the commands that made them.

The page is a single file without scripts and without links to other files, so it can be sent by mail or kept beside the
results.
"""

import base64
from html import escape
from pathlib import Path

from utils.errors import UserError

# The first bytes of every PNG file.
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5b6875; --line: #dde3e9; --page: #f6f8fa; --card: #ffffff;
  --accent: #2f6fb0; --mark: #e8f1fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --soft: #9aa7b4; --line: #323b45; --page: #14191f;
  --card: #1c232b; --accent: #7ab3ea; --mark: #22364a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0 0 .5rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 0 0 .75rem; font-size: 1.25rem; }
p { max-width: 46rem; margin: 0 0 1rem; }
section { margin-top: 1.5rem; padding: 1.5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
section > :last-child { margin-bottom: 0; }
.wide { overflow-x: auto; margin-bottom: 1rem; }
table { width: 100%; border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; font-weight: 500; white-space: normal; }
thead th { color: var(--soft); font-weight: 600; border-bottom-width: 2px; vertical-align: bottom; }
tr.marked { background: var(--mark); }
figure { margin: 0 0 1.25rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff; border-radius: 6px; }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .9rem; text-align: center; }
.grid { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
pre { overflow-x: auto; margin: 0 0 .9rem; padding: .7rem .9rem; background: var(--page); border-radius: 6px;
  border: 1px solid var(--line); font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.step { margin: 0 0 .25rem; font-weight: 600; font-size: .93rem; }
.step span { color: var(--soft); font-weight: 400; }
ul { margin: 0 0 1rem; padding-left: 1.2rem; }
h1, p, li, figcaption { overflow-wrap: anywhere; }
td:first-child { overflow-wrap: anywhere; min-width: 8rem; }
table.words td, table.words th { text-align: left; white-space: normal; vertical-align: top; overflow-wrap: anywhere; }
table.words td:first-child { width: 30%; }
@media print {
  :root { color-scheme: light; --ink: #000000; --soft: #444444; --line: #bbbbbb; --page: #ffffff; --card: #ffffff;
    --mark: #eeeeee; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  section { margin: 0; padding: 0 0 1rem; border: 0; border-radius: 0; }
  section + section { break-before: page; }
  h2, .step { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  figure img { max-height: 21cm; }
  .wide { overflow-x: visible; }
  th, td { white-space: normal; padding: .2rem .4rem; }
}
"""


def paragraph(text: str) -> str:
    """Return one paragraph of plain text as HTML."""
    return f"<p>{escape(text)}</p>"


def table(rows: dict[str, dict], first: str, marked: tuple[str, ...] = (), digits: int = 3) -> str:
    """Return a table as HTML.

    Parameters
    ----------
    rows : dict
        Row name → column name → number or text. A value that is missing, None or NaN leaves its place empty.
    first : str
        Heading of the column that holds the row names.
    marked : tuple of str
        Names of rows on a coloured ground.
    digits : int
        Digits behind the point of numbers that are not whole.

    Returns
    -------
    str
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))

    def shown(value) -> str:
        if value is None or value != value:  # only NaN differs from itself
            return ""
        return escape(f"{value:.{digits}f}" if isinstance(value, float) else str(value))

    head = "".join(f"<th>{escape(name)}</th>" for name in (first, *columns))
    lines = []
    for name, row in rows.items():
        start = '<tr class="marked">' if name in marked else "<tr>"
        cells = "".join(f"<td>{text}</td>" for text in (escape(name), *(shown(row.get(column)) for column in columns)))
        lines.append(f"{start}{cells}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def words(rows: dict[str, str], head: tuple[str, str] | None = None) -> str:
    """Return a table of two columns of text as HTML: what something is called, and what it is.

    Parameters
    ----------
    rows : dict
        Text of the first column → text of the second.
    head : tuple of str, optional
        Headings of the two columns.
    """
    above = (
        "" if head is None else "<thead><tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr></thead>"
    )
    body = "\n".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in rows.items())
    return f'<div class="wide"><table class="words">\n{above}\n<tbody>\n{body}\n</tbody>\n</table></div>'


def bullets(lines: list[str]) -> str:
    """Return lines of plain text as an HTML list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def code(text: str) -> str:
    """Return a command as HTML."""
    return f"<pre>{escape(text)}</pre>"


def figure(path: str | Path, caption: str) -> str:
    """Return a PNG file as HTML, its pixels inside the text.

    Parameters
    ----------
    path : path-like
        PNG file.
    caption : str
        What the figure shows; it stands below it and is read out in its place.

    Returns
    -------
    str

    Raises
    ------
    UserError
        If the file is missing or is not a PNG file.
    """
    path = Path(path)
    content = path.read_bytes() if path.is_file() else b""
    if not content.startswith(PNG_SIGNATURE):
        raise UserError(f"{path}: is not a PNG figure; run the command that draws it again")
    pixels, caption = base64.b64encode(content).decode(), escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{pixels}"><figcaption>{caption}</figcaption></figure>'
    )


def grid(parts: list[str]) -> str:
    """Return several parts side by side, as HTML; on a narrow screen they stand one below the other."""
    return f'<div class="grid">{"".join(parts)}</div>'


def commands(stages: dict[str, dict]) -> str:
    """Return the commands of a run as HTML, in the order in which they ran.

    Parameters
    ----------
    stages : dict
        Stage name → `command` (str) and `seconds` (float), as `benchmarks.lib.stages.Stages.used` holds them.

    Returns
    -------
    str
    """
    return "\n".join(
        f'<p class="step">{number}. {escape(name)} <span>{stage["seconds"]:.0f} s</span></p>{code(stage["command"])}'
        for number, (name, stage) in enumerate(stages.items(), 1)
    )


def write_report(path: str | Path, title: str, lead: str, sections: dict[str, list[str]]) -> Path:
    """Write the page and return its path.

    Parameters
    ----------
    path : path-like
        HTML file to write; its folder is made.
    title, lead : str
        The page's heading, and the paragraph below it.
    sections : dict
        Heading of a section → its parts, made by the functions above, from top to bottom.

    Returns
    -------
    Path
    """
    body = "\n".join(
        f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(parts) + "\n</section>"
        for heading, parts in sections.items()
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{paragraph(lead)}\n{body}\n</main>\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return path
