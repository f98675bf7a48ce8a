"""Explanations drawn: a strip of tokens, each in the colour of the adapter that was at work, for terminals and for pages.

A token has the colour of the adapter with the largest share in reading it (the prompt's) or writing it (the answer's), the stronger the
larger that share. It has none where the base has more, or where nobody leads (`recycler.seeing.explaining.Explanation.owner`).

A page takes `strip_css()` once, in a ``<style>``, and then any number of `strip_html(explanation)`. They bring no script and load
nothing: what a token has to say appears when it is focused, touched or pointed at. `strip_js()`, in a ``<script>``, makes a strip one stop
of the tab key, with arrow keys from token to token.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping
from hashlib import sha256
from html import escape
from typing import TYPE_CHECKING
from unicodedata import bidirectional

from recycler.zoo.untrusted import OBEYED

if TYPE_CHECKING:
    from rich.text import Text

    from recycler.seeing.explaining import Explanation

# Told apart with any colour vision, in this order (Okabe and Ito, their black left out), and the same hues for dark pages, moved apart
# until that holds there as well. Text on a tint of them is the page's own. The last one is everybody's who comes after these.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
DARK = ("#3b72c4", "#eb7019", "#17a86f", "#c09cb7", "#6cb7fb", "#c44b0e", "#ecba1d")
OTHER, OTHER_DARK = "#5c5c5c", "#cacaca"
FEW = ("bright_blue", "yellow", "green", "magenta", "bright_cyan", "red", "bright_yellow", "white")  # where there are 16
_SHOWN = 5  # adapters in a token's details
_LEAST = 5e-3  # shares below it are not told

Slots = Mapping[str, int]


def slots(explanations: Iterable[Explanation]) -> dict[str, int]:
    """Adapter → number of its colour, the same in all of the explanations: those that own most tokens first, then those with the
    largest shares. One grey is for all that come after the last colour."""
    mass: dict[str, list[float]] = {}
    for one in explanations:
        owners = [one.owner(i) for i in range(len(one.tokens))]
        for name, share in one.share.items():
            owned, shares = mass.get(name, (0.0, 0.0))
            mass[name] = [owned + owners.count(name) / len(owners), shares + abs(share)]
    order = sorted(mass, key=lambda name: (-mass[name][0], -mass[name][1], name))
    return {name: min(number, len(COLOURS)) for number, name in enumerate(order)}


# ------------------------------------------------------------------------------------------------------------------ terminals


def strip_text(one: Explanation, colours: Slots | None = None, *, few: bool = False) -> Text:
    """The tokens, for rich: dark on a tint of the adapter's colour, so that it reads on any terminal.

    Args:
        few: the terminal has 16 colours, where tints of different hues would be one and the same.
    """
    from rich.text import Text

    colours = slots([one]) if colours is None else colours
    drawn = Text(end="")
    for i in range(len(one.tokens)):
        owner = one.owner(i)
        share = 0.0 if owner is None else abs(float(one.share_TE[i, one.adapters.index(owner)]))
        style = "" if owner is None else f"black on {_ground(_slot(owner, colours), share, few)}"
        if owner is None and one.special[i]:
            style = "dim"
        if i == one.begins:
            drawn.append("▸", style="bold")
        for line in visible(one.tokens[i]).splitlines(keepends=True):
            drawn.append(line.rstrip("\n"), style=style)
            drawn.append("\n" if line.endswith("\n") else "")
    return drawn


def legend_text(one: Explanation, colours: Slots, *, few: bool = False) -> Text:
    """Whose colour is which in a strip, in one line for rich."""
    from rich.text import Text

    drawn = Text()
    for slot, names in legend(one, colours):
        drawn.append("   ", style=f"on {_ground(slot, 1.0, few)}").append(f" {_told(names)}  ")
    return drawn.append("no colour: the base, or nobody in the lead", style="dim")


def legend(one: Explanation, colours: Slots) -> list[tuple[int, list[str]]]:
    """(number of a colour, whose it is), for all that own a token of this answer."""
    owners = {owner for i in range(len(one.tokens)) if (owner := one.owner(i)) is not None}
    found: dict[int, list[str]] = {}
    for name in sorted(owners, key=lambda name: (_slot(name, colours), name)):
        found.setdefault(_slot(name, colours), []).append(name)
    return list(found.items())


def _told(names: list[str]) -> str:
    return OBEYED.sub("", names[0]) if len(names) == 1 else f"{len(names)} others"


def visible(token: str) -> str:
    """A token as it can be shown: line ends and tabs as signs (a line still ends), what a terminal would obey spelled out."""
    spelled = OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", token)
    return spelled.replace("\t", "⇥").replace("\n", "↵\n") or "·"


def _slot(name: str, colours: Slots) -> int:
    return colours.get(name, len(COLOURS))


def _ground(slot: int, share: float, few: bool) -> str:
    """A colour by its number, towards white, the more so the smaller the share; never so dark that black on it does not read."""
    if few:
        return FEW[slot]
    white = 0.2 + 0.55 * (1 - min(1.0, share))
    colour = (*COLOURS, OTHER)[slot]
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in parts)


# ---------------------------------------------------------------------------------------------------------------------- pages


def strip_html(one: Explanation, colours: Slots | None = None) -> str:
    """Legend and tokens as a fragment of a page. Everything in it is escaped.

    Args:
        colours: from `slots`, where several strips of a page are to share them.
    """
    colours = slots([one]) if colours is None else colours
    parts = (("prompt", range(one.begins)), ("answer", range(one.begins, len(one.tokens))))
    groups = "".join(
        f'<div role="group" aria-label="{name}" class="strip-part strip-{name}" dir="{direction(one.tokens[i] for i in numbers)}">'
        f'<span class="strip-name" aria-hidden="true">{name}</span>{"".join(_token(one, i, colours) for i in numbers)}</div>'
        for name, numbers in parts
    )
    return (
        f'<figure class="strip">{_legend(one, colours)}'
        f'<div class="strip-tokens" role="listbox" aria-label="Tokens, each with who was at work on it">{groups}</div></figure>'
    )


def direction(texts: Iterable[str]) -> str:
    """Of writing: that of the first letter which has one. The browser's own guess would see labels and details as well."""
    kinds = (bidirectional(letter) for text in texts for letter in text)
    return "rtl" if next((kind for kind in kinds if kind in ("L", "R", "AL")), "L") != "L" else "ltr"


def _legend(one: Explanation, colours: Slots) -> str:
    items = []
    for slot, names in legend(one, colours):
        title = f' title="{escape(OBEYED.sub("", ", ".join(names)))}"' if len(names) > 1 else ""
        items.append(f'<li{title}><i class="strip-c{slot}"></i>{escape(_told(names))}</li>')
    items.append("<li><i></i>the base, or nobody in the lead</li>")
    return f'<ul class="strip-legend">{"".join(items)}</ul>'


def _token(one: Explanation, i: int, colours: Slots) -> str:
    owner = one.owner(i)
    share = 0.0 if owner is None else min(1.0, abs(float(one.share_TE[i, one.adapters.index(owner)])))
    classes = ["strip-t"] + ([strip_class(owner, colours)] if owner is not None else [])
    classes += ["strip-special"] if one.special[i] else []
    lines = details(one, i)
    shown = visible(one.tokens[i])
    label = escape(f"{shown.strip() or 'space'}: " + "; ".join(f"{name} {value}" for name, value in lines))
    told = "".join(f"<span><span>{escape(name)}</span> <b>{escape(value)}</b></span>" for name, value in lines)
    return (
        f'<span class="{" ".join(classes)}" role="option" aria-selected="false" tabindex="0" aria-label="{label}" style="--s:{share:.2f}">'
        f'{escape(shown.removesuffix(chr(10)))}<span class="strip-d" dir="ltr"><code>{escape(shown.rstrip())}</code>{told}</span></span>'
        + chr(10)
        * shown.endswith(chr(10))
    )


def details(one: Explanation, i: int) -> list[tuple[str, str]]:
    """What there is to say about a token: who read or wrote it, and in the answer its log-probability and whose doing that was."""
    pairs = sorted(zip(one.adapters, one.share_TE[i].tolist(), strict=True), key=lambda pair: (-abs(pair[1]), pair[0]))
    lines = [(OBEYED.sub("", name), f"{share:.0%}") for name, share in pairs[:_SHOWN] if abs(share) >= _LEAST]
    rest = sum(share for _, share in pairs[_SHOWN:])
    lines += [("other adapters", f"{rest:.0%}")] if abs(rest) >= _LEAST else []
    lines += [("base", f"{one.base_share(i):.0%}")] if one.base_share(i) >= _LEAST else []
    a = i - one.begins
    if a >= 0:
        lines += [("log p", f"{float(one.routed_A[a]):.2f}"), ("log p of the base", f"{float(one.base_A[a]):.2f}")]
        effects = sorted(((name, float(one.effect_A(name)[a])) for name in one.fired), key=lambda pair: -abs(pair[1]))
        lines += [
            (f"effect of {OBEYED.sub('', name)}", signed(effect)) for name, effect in effects[:3] if abs(effect) >= _LEAST
        ]
    return lines


def signed(value: float) -> str:
    """With two digits, and a sign unless they are 0."""
    text = f"{value:+.2f}"
    return text[1:] if float(text) == 0 else text


def strip_class(name: str, colours: Slots) -> str:
    """The class that gives an element an adapter's colour, as ``--c``."""
    return f"strip-c{_slot(name, colours)}"


def strip_css() -> str:
    """The style of all strips of a page. ``--strip-ink``, ``--strip-paper``, ``--strip-muted`` and ``--strip-line`` may be set by it."""
    themes = ((*COLOURS, OTHER), (*DARK, OTHER_DARK))
    light, dark = ("".join(f".strip-c{n}{{--c:{c}}}" for n, c in enumerate(theme)) for theme in themes)
    return f"{_CSS}{light}@media (prefers-color-scheme:dark){{{dark}}}"


def policy(script: str) -> str:
    """A content policy for a page with one script: nothing is loaded, and nothing else runs."""
    digest = b64encode(sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def strip_js() -> str:
    """One stop of the tab key a strip; arrows, Home and End go from token to token, Escape lets go."""
    return _JS


_CSS = """
:root{--strip-ink:#1c1c1e;--strip-paper:#fff;--strip-muted:#5f6368;--strip-line:#d5d7da;--strip-strength:55%}
@media (prefers-color-scheme:dark){:root{--strip-ink:#ececee;--strip-paper:#17181a;--strip-muted:#a0a4aa;--strip-line:#3b3d41;--strip-strength:45%}}
.strip{margin:0;color:var(--strip-ink)}
.strip-legend{list-style:none;display:flex;flex-wrap:wrap;gap:.3em 1.1em;margin:0 0 .7em;padding:0;font-size:.875em}
.strip-legend li{display:flex;align-items:center;gap:.45em;overflow-wrap:anywhere}
.strip-legend i{flex:none;width:1.4em;height:1em;border-bottom:3px solid var(--c,var(--strip-line));print-color-adjust:exact;
 background:color-mix(in srgb,var(--c,transparent) var(--strip-strength),transparent)}
.strip-tokens{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.95em;line-height:2;overflow-wrap:anywhere}
.strip-part{white-space:pre-wrap;border-inline-start:3px solid var(--strip-line);padding-inline-start:.8em;margin:.5em 0}
.strip-answer{border-inline-start-color:var(--strip-ink)}
.strip-name{display:block;font:600 .75rem/1.6 system-ui,sans-serif;color:var(--strip-muted)}
.strip-t{padding:.12em 0;border-bottom:3px solid var(--c,transparent);cursor:default;outline-offset:1px;
 scroll-margin:2rem 0 11rem;print-color-adjust:exact;-webkit-print-color-adjust:exact;
 background:color-mix(in srgb,var(--c,transparent) calc(var(--s,0)*var(--strip-strength)),transparent);
 -webkit-box-decoration-break:clone;box-decoration-break:clone}
.strip-t+.strip-t{box-shadow:-1px 0 var(--strip-paper)}
.strip-part[dir=rtl] .strip-t+.strip-t{box-shadow:1px 0 var(--strip-paper)}
.strip-special{font-style:italic}
.strip-t:focus{outline:2px solid var(--strip-ink);position:relative;z-index:1}
.strip-d{display:none;position:fixed;z-index:10;left:0;right:0;bottom:0;padding:.6em 1em;gap:.2em 1.2em;flex-wrap:wrap;
 font:.875rem/1.6 system-ui,sans-serif;white-space:normal;color:var(--strip-ink);background:var(--strip-paper);
 border-top:1px solid var(--strip-line);box-shadow:0 -4px 16px #0003;pointer-events:none}
.strip-d code{font-weight:600;white-space:pre}
.strip-t:focus>.strip-d{display:flex}
.strip-tokens:not(:focus-within) .strip-t:hover>.strip-d{display:flex}
@media print{.strip-t>.strip-d{display:none!important}}
"""

_JS = """
for (const strip of document.querySelectorAll(".strip-tokens")) {
  const all = [...strip.querySelectorAll(".strip-t")];
  const go = (to) => {
    all.forEach((t) => { t.tabIndex = t === to ? 0 : -1; t.setAttribute("aria-selected", t === to); });
  };
  if (all.length) go(all[0]);
  all.forEach((t) => t.setAttribute("aria-selected", "false"));
  strip.addEventListener("focusin", (event) => { const t = event.target.closest(".strip-t"); if (t) go(t); });
  strip.addEventListener("keydown", (event) => {
    const at = all.indexOf(document.activeElement);
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") return all[at].blur();
    const on = getComputedStyle(all[at]).direction === "rtl" ? -1 : 1;
    const step = { ArrowRight: at + on, ArrowDown: at + 1, ArrowLeft: at - on, ArrowUp: at - 1, Home: 0, End: all.length - 1 };
    const next = step[event.key];
    if (next === undefined) return;
    event.preventDefault();
    all[Math.max(0, Math.min(all.length - 1, next))].focus();
  });
}
"""
