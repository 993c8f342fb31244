"""Results as text in a terminal, and as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fastlm._files import write_atomic
from fastlm.labs.result import LabResult, Table, in_words

NAME_WIDTH = 16  # cells of the first column that are not wrapped
STYLE = """
:root{color-scheme:light dark;--line:color-mix(in srgb,currentColor 18%,transparent)}
body{font:16px/1.6 system-ui,"Apple SD Gothic Neo","Malgun Gothic","Noto Sans KR",sans-serif;max-width:56rem;
margin:2rem auto;padding:0 1rem}
h2{margin-top:3rem;border-top:1px solid var(--line);padding-top:1.5rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.8rem 0 .3rem}
td,th{padding:.2rem .8rem .2rem 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
.wide{overflow-x:auto}img{max-width:100%;height:auto;background:#fff}
figure{margin:1.2rem 0}figcaption,.small{font-size:.85rem;opacity:.8}
.holds{color:#1a7f37}.fails{color:#b35900}
"""
WORDS = {
    "ko": {
        "holds": "맞음",
        "fails": "맞지 않음",
        "left out": "빠진 부분",
        "report": "언어 모델의 열한 가지 생각",
        "summary": "주장과 결과",
        "lab": "실험",
        "claim": "주장",
        "outcome": "결과",
    },
    "en": {
        "holds": "holds",
        "fails": "does not hold",
        "left out": "left out",
        "report": "Ideas of language models, tried",
        "summary": "Claims and outcomes",
        "lab": "lab",
        "claim": "claim",
        "outcome": "outcome",
    },
}


def print_result(result: LabResult, console: Console) -> None:
    words = WORDS[result.settings["lang"]]
    console.print(Text.assemble("\n", (result.idea, "bold cyan"), " ", result.title))
    for table in result.tables:
        console.print(_rich_table(table))
    for finding in result.findings:
        mark, style = ("✓", "green") if finding.holds else ("✗", "yellow")
        console.print(Text(f"{mark} {finding.claim} — {words['holds' if finding.holds else 'fails']}", style))
        console.print(Text(f"  {finding.statement}"))
    for note in result.notes:
        console.print(Text(f"· {note}"))
    for line in result.missing:
        console.print(Text(f"! {words['left out']}: {line}", "yellow"))


def _rich_table(table: Table) -> RichTable:
    shown = RichTable(title=Text(table.title, "bold"), title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(table.columns):
        numeric = all(not isinstance(row[i], str) for row in table.rows)
        widest = max(cell_len(in_words(row[i])) for row in table.rows) if table.rows and i == 0 else 0
        shown.add_column(
            Text(column), justify="right" if numeric else "left", overflow="fold", min_width=min(widest, NAME_WIDTH)
        )
    for row in table.rows:
        shown.add_row(*[Text(in_words(cell)) for cell in row])
    return shown


def write_report(results: Sequence[LabResult], directory: Path, out: Path) -> None:
    """One HTML file with everything in it: no script, no link to another file or address."""
    lang = results[0].settings["lang"] if results else "en"
    words = WORDS[lang]
    rows = [
        f"<tr><td><a href='#{r.idea}'>{r.idea}</a><td>{escape(f.claim)}<td>{_outcome(f.holds, lang)}"
        for r in results
        for f in r.findings
    ]
    summary = (
        f"<h2>{words['summary']}</h2><div class=wide><table><tr><th>{words['lab']}<th>{words['claim']}"
        f"<th>{words['outcome']}{''.join(rows)}</table></div>"
    )
    parts = [_section(result, directory) for result in results]
    write_atomic(
        out,
        f"<!doctype html><html lang={lang}><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{words['report']}</title><style>{STYLE}</style><h1>{words['report']}</h1>{summary}{''.join(parts)}",
    )


def _outcome(holds: bool, lang: str) -> str:
    word = WORDS[lang]["holds" if holds else "fails"]
    return f"<span class={'holds' if holds else 'fails'}>{'✓' if holds else '✗'} {word}</span>"


def _section(result: LabResult, directory: Path) -> str:
    lang = result.settings["lang"]
    html = [f"<h2 id={result.idea}>{escape(result.title)}</h2><p class=small>fastlm lab {result.idea}"]
    html.append(f" · {result.seconds:.0f} s</p>")
    for finding in result.findings:
        html.append(f"<p><b>{escape(finding.claim)}</b> {_outcome(finding.holds, lang)}<br>")
        html.append(f"{escape(finding.statement)}</p>")
    html += [f"<p>{escape(note)}</p>" for note in result.notes]
    html += [f"<p class=fails>{WORDS[lang]['left out']}: {escape(line)}</p>" for line in result.missing]
    for picture in result.pictures:
        data = base64.b64encode((directory / picture.file).read_bytes()).decode()
        html.append(
            f"<figure><img alt='{escape(picture.title)}' src='data:image/png;base64,{data}'>"
            f"<figcaption>{escape(picture.title)}</figcaption></figure>"
        )
    for table in result.tables:
        head = "".join(f"<th>{escape(column)}" for column in table.columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(in_words(c))}" for c in row) for row in table.rows)
        html.append(f"<div class=wide><table><caption>{escape(table.title)}</caption><tr>{head}{body}</table></div>")
    return "".join(html)
