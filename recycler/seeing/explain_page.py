"""Explanations as one page that opens from disk: no script or style from elsewhere, dark and light, wide and narrow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.pictures import canvas, tokens
from recycler.seeing.strips import Slots, policy, signed, slots, strip_class, strip_css, strip_html, strip_js
from recycler.zoo.untrusted import OBEYED

if TYPE_CHECKING:
    from recycler.seeing.explaining import Explanation

_ROWS = 24  # adapters in a table


def write_page(explanations: Sequence[Explanation], file: Path, *, title: str = "Who answered", force: bool = False) -> Path:
    """Writes `page`.

    Raises:
        UsageError: the file exists, and not `force`.
    """
    canvas.check_free(file, force, option="--html")
    canvas.write_bytes(file, page(explanations, title=title).encode("utf8", "replace"))
    return file


def page(explanations: Sequence[Explanation], *, title: str = "Who answered") -> str:
    """The whole page. Everything that is quoted is escaped, and a content policy lets nothing be loaded."""
    colours = slots(explanations)
    body = "".join(_section(one, colours, number) for number, one in enumerate(explanations, 1))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(strip_js())}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{_text(title)}</title><style>{_CSS}{strip_css()}</style></head><body>'
        f"<header><h1>{_text(title)}</h1><p>{_HOW}</p></header><main>{body}</main>"
        f"<script>{strip_js()}</script></body></html>\n"
    )


def _section(one: Explanation, colours: Slots, number: int) -> str:
    routed, base = float(one.routed_A.sum()), float(one.base_A.sum())
    why = "" if one.why is None else f"<details><summary>The router’s reason</summary><pre>{_json(one.why)}</pre></details>"
    return (
        f"<section><h2>{_text(_short(one.prompt))}</h2>"
        f'<p class="sum">{_text(one.method)}: log&nbsp;p(answer) <b>{routed:.2f}</b>, by the bare base <b>{base:.2f}</b></p>'
        f"{strip_html(one, colours)}"
        f'<p class="csv"><a href="{canvas.csv_link(tokens.table(one))}" download="tokens-{number}.csv">Tokens as CSV</a></p>'
        f"{_adapters(one, colours)}{_layers(one, colours)}{why}</section>"
    )


def _adapters(one: Explanation, colours: Slots) -> str:
    if not one.fired:
        return "<p>No adapter fired: this is the base’s own answer.</p>"
    effect = one.effect
    asked, answered = one.share_of(0, one.begins), one.share_of(one.begins, len(one.tokens))
    most = max(1e-9, *(abs(value) for value in effect.values()))
    rows = []
    for name in one.chief(_ROWS):
        width = 50 * abs(effect[name]) / most
        bar = f'<i class="{"up" if effect[name] >= 0 else "down"}" style="width:{width:.1f}%"></i>'
        rows.append(
            f'<tr><th scope="row">{_named(name, colours)}</th><td>{asked[name]:.1%}</td><td>{answered[name]:.1%}</td>'
            f'<td>{signed(effect[name])}</td><td class="bar" aria-hidden="true">{bar}</td></tr>'
        )
    more = len(one.fired) - len(rows)
    rest = f"<p>and {more} more with smaller shares and effects</p>" if more > 0 else ""
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Adapters"><table><thead><tr><th scope="col">adapter</th>'
        '<th scope="col">prompt</th><th scope="col">answer</th><th scope="col">effect</th><th aria-hidden="true"></th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{rest}"
    )


def _layers(one: Explanation, colours: Slots) -> str:
    if not one.fired:
        return ""
    head = "".join(f'<th scope="col">{_text(layer)}</th>' for layer in one.layers)
    rows = []
    for name in one.chief(_ROWS):
        column = one.share_LE[:, one.adapters.index(name)].tolist()
        cells = "".join(f'<td style="--s:{min(1.0, abs(share)):.2f}">{_percent(share)}</td>' for share in column)
        rows.append(f'<tr class="{strip_class(name, colours)}"><th scope="row">{_named(name, colours)}</th>{cells}</tr>')
    return (
        '<details open><summary>By layer, in percent</summary><div class="wide" tabindex="0" role="region" aria-label="Shares by layer">'
        f'<table class="heat"><thead><tr><th scope="col">layer</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></details>'
    )


def _percent(share: float) -> str:
    text = f"{100 * share:.0f}"
    return "" if text in ("0", "-0") else text


def _named(name: str, colours: Slots) -> str:
    return f'<span class="name"><i class="{strip_class(name, colours)}"></i>{_text(name)}</span>'


def _text(value: str) -> str:
    return escape(OBEYED.sub("", value))


def _short(text: str, limit: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def _json(value: Any) -> str:
    return _text(json.dumps(value, indent=2, ensure_ascii=False))


_HOW = (
    "Each token has the colour of the adapter with the largest share in reading it (the prompt’s) or writing it (the answer’s), the "
    "stronger the larger; none where the base has more, or nobody leads. Point at a token, touch it, or use Tab and the arrow keys for its numbers. An effect is what "
    "log&nbsp;p(answer) loses when that adapter’s weights are set to 0 and all others stay as they were, not renormalised: above 0 "
    "the adapter helped."
)

_CSS = """
*{box-sizing:border-box}
body{margin:0;padding:1.2rem clamp(1rem,4vw,3rem) 9rem;max-width:72rem;font:1rem/1.5 system-ui,sans-serif;
 color:var(--strip-ink);background:var(--strip-paper)}
a{color:inherit}.csv{margin:.25rem 0;font-size:.925rem}
:focus-visible{outline:2px solid var(--strip-ink);outline-offset:2px}
header p,.sum{color:var(--strip-muted);max-width:46rem}
h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.1rem;margin:0;overflow-wrap:anywhere}
section{border-top:1px solid var(--strip-line);padding:1.4rem 0}
.sum{margin:.2rem 0 1rem}.sum b{color:var(--strip-ink)}
.wide{overflow-x:auto;margin-top:1rem;max-width:100%}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--strip-line)}
th{font-weight:600}thead th{color:var(--strip-muted);font-weight:400}
th:first-child{text-align:left;position:sticky;left:0;background:var(--strip-paper)}
.name{display:inline-flex;align-items:center;gap:.5em;max-width:16rem;white-space:normal;overflow-wrap:break-word}
.name i{flex:none;width:.8em;height:.8em;background:var(--c,transparent);border:1px solid var(--c,var(--strip-line))}
.bar{width:12rem;min-width:8rem;position:relative;background:linear-gradient(var(--strip-line),var(--strip-line)) 50%/1px 100% no-repeat}
.bar i{position:absolute;top:.45rem;bottom:.45rem}
.up{left:50%;background:#009e73}.down{right:50%;background:#d55e00}
.heat td{padding:.25rem .35rem;min-width:2rem;
 background:color-mix(in srgb,var(--c,transparent) calc(var(--s)*var(--strip-strength)),transparent)}
@media (max-width:30rem){th,td{padding:.25rem .35rem}th:first-child{padding-left:0}}
details{margin-top:1rem}summary{cursor:pointer}
pre{overflow-x:auto;font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
@media print{body{padding:0}.wide{overflow:visible}table{font-size:.65rem}th,td{padding:.15rem .2rem}.heat td{min-width:0}.bar,.bar i,.heat td,.name i{print-color-adjust:exact}}
"""
