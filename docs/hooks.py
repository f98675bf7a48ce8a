"""What the site says of methods, options and commands is read from the code when it is built, so that it cannot be out of date.

- A page of ``methods/`` is written by hand: when to use the method, what it costs. Facts, options, formula and source come from the
  router's class, its Config and its file's docstring, the numbers from README.md.
- ``<!-- commands -->`` becomes every command with its help.
- ``<!-- policies -->`` becomes the table of the policies' options.
- ``<!-- kinds -->`` becomes the table of adapter formats.
- ``<!-- include: FILE -->`` and ``<!-- include: FILE#Heading -->`` become that file of the repository, or that section of it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
# Where the site has what the repository's files link to.
LINKS = {
    "benchmarks/README.md": "engine.md",
    "benchmarks/": "engine.md",
    "docs/": "",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
WIDTH = 84  # of help texts; a page holds as much
KINDS = {
    "sequence": "once a sequence, from the prompt",
    "token": "token by token, at every group of linears",
    "static": "once, for everything",
}


# -- mkdocs


def on_config(config: Any) -> Any:
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = ["methods/index.md", *(f"methods/{name}.md" for name in methods())]
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    files.append(File.generated(config, "assets/cost.png", abs_src_path=str(ROOT / "benchmarks" / "cost.png")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return rendered(markdown, page.file.src_uri)


def rendered(markdown: str, path: str) -> str:
    """A page as the site has it; `path` is below docs/."""
    folder, _, name = path.rpartition("/")
    if folder == "methods" and name == "index.md":
        markdown = markdown.replace("<!-- methods -->", method_table())
    elif folder == "methods":
        markdown = method_page(name.removesuffix(".md"), markdown)
    for marker, made in (("commands", commands), ("policies", policies), ("kinds", kinds)):
        if f"<!-- {marker} -->" in markdown:
            markdown = markdown.replace(f"<!-- {marker} -->", made())
    markdown = re.sub(r"<!-- include: ([^#>]+?)(?:#([^>]+?))? -->", lambda found: include(found[1], found[2]), markdown)
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else re.sub(r"^\|.*$", _breaks, part, flags=re.M) for part in parts)


def _breaks(row: re.Match[str]) -> str:
    """A row of a table, in which an interval is not broken, and method:option=value may be."""
    text = re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", row[0])
    return re.sub(r"^\| [*\w:=]+", lambda found: found[0].replace(":", ":<wbr>"), text)


def include(file: str, heading: str | None = None) -> str:
    """A file of the repository, or the section of it under a heading, with links that hold on the site."""
    text = (ROOT / file).read_text(encoding="utf8")
    if heading is None:
        text = re.sub(r"\A# .*\n", "", text)
    else:
        found = re.search(rf"^(#+) {re.escape(heading)}\n", text, flags=re.M)
        if found is None:
            raise ValueError(f"{file} has no heading {heading!r}, which a page of docs/ includes")
        text = re.split(rf"^#{{1,{len(found[1])}}} ", text[found.end() :], flags=re.M)[0]
    for old, new in LINKS.items():
        text = text.replace(f"]({old})", f"]({new})" if new else "](index.md)")
    text = text.replace("](docs/", "](")
    return text.replace("](cost.png)", "](assets/cost.png)").strip()


# -- methods


def methods() -> dict[str, Any]:
    """Name → class, for every file of routers/ that defines a router."""
    from recycler.routers import discovery

    return {name: cls for name, cls in discovery.methods().items() if cls.__module__.startswith("recycler.routers.")}


def method_page(name: str, prose: str) -> str:
    cls = methods()[name]
    title, _, rest = prose.strip().partition("\n")
    doc = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    parts = [title, facts(cls), rest.strip()]
    if numbers := readme_rows(name):
        parts += ["## Numbers", numbers]
    parts += ["## Options", options_of(cls)]
    parts += [
        "## Formula, source, departures",
        f"`{_one_line(cls.__doc__ or '')}`",
        linked(doc),
        f"Source: {linked(cls.paper)}.",
    ]
    parts += [f"The code is [`routers/{name}.py`](../api.md#routers), and this section is its docstring."]
    return "\n\n".join(parts) + "\n"


def facts(cls: Any) -> str:
    needs = ", ".join(sorted(cls.needs)) or "nothing"
    fitting = "gradient steps, or a search: minutes" if cls.trains else "without gradient steps"
    rows = [
        ("decides", KINDS[cls.granularity]),
        ("needs", needs),
        ("fitting", fitting),
        ("one adapter more or less, later", "yes" if cls.extends() else "no: build it again"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def method_table() -> str:
    rows = ["| method | decides | needs | add later | source |", "|---|---|---|---|---|"]
    for kind in KINDS:
        for name, cls in methods().items():
            if cls.granularity == kind:
                needs = ", ".join(sorted(cls.needs)) or "nothing"
                later = "yes" if cls.extends() else ""
                rows.append(
                    f"| [`{name}`]({name}.md) | {KINDS[kind].split(',')[0]} | {needs} | {later} | {linked(cls.paper)} |"
                )
    return "\n".join(rows)


def readme_rows(name: str) -> str:
    """The method's rows of README.md's comparison, beside base, best single, uniform and oracle."""
    tables = re.findall(r"(?:^\|.*\|\n)+", (ROOT / "README.md").read_text(encoding="utf8"), flags=re.M)
    table: list[str] = next((t.splitlines() for t in tables if t.startswith("| method | held-in |")), [])
    if not table:
        raise ValueError("README.md has no table that begins with | method | held-in |")
    beside = ("base", "best single", "uniform", "oracle")
    named = [(line.split("|")[1].strip(), line) for line in table[2:]]
    own = [line.replace(f"| {key}", f"| **{key}**", 1) for key, line in named if key.split(":")[0] == name]
    if not own:
        return ""
    rows = [*table[:2], *(line for key, line in named if key in beside and key != name), *own]
    rows = ["|".join(row.split("|")[:-2]) + "|" for row in rows]  # without the last column: what it needs stands above
    return "\n".join(rows) + (
        "\n\nExact match on rows that nothing was fitted on; what the columns are, and how it was measured: [Which one?](../choosing.md)"
    )


# -- options


def options_of(cls: Any) -> str:
    """The table of a Config's own options; those of Policy have a page of their own."""
    from recycler.routers.select import Policy

    shared = {f.name for f in fields(Policy)} if issubclass(cls.Config, Policy) else set()
    own = [
        row
        for row in option_rows(cls.Config)
        if row[0] not in shared or (row[0] in _described(cls.Config) and cls.Config is not Policy)
    ]
    text = option_table(own) if own else ("It has none of its own." if shared else "It has none.")
    if shared:
        text += (
            "\n\nAnd how scores become weights: `policy`, `top_k`, `temperature` and the others of [policies](../policies.md)."
        )
    return f"As `-o key=value`, as Python keywords, and in `router.json`.\n\n{text}"


def option_table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| option | takes | default | |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {kind} | `{default}` | {linked(what)} |" for name, kind, default, what in rows])


def option_rows(config: Any) -> list[tuple[str, str, str, str]]:
    """(name, what it takes, default, what it does) of every field."""
    hints, described = get_type_hints(config), dict[str, str]()
    for parent in reversed(config.__mro__):
        described |= _described(parent)
    return [(f.name, _takes(hints[f.name]), _default(f.default), described.get(f.name, "")) for f in fields(config)]


def _default(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _described(config: Any) -> dict[str, str]:
    """Field → its words in the docstring's Attributes, where several may share a sentence's line."""
    doc = inspect.cleandoc(config.__dict__.get("__doc__") or "")
    if "Attributes:" not in doc:
        return {}
    text = " ".join(doc.split("Attributes:", 1)[1].split())
    name = "|".join(f.name for f in fields(config))
    found = list(re.finditer(rf"(?:^|(?<=[.;)] ))((?:{name})(?:, (?:{name}))*): ", text))
    ends = [*(match.start() for match in found[1:]), len(text)]
    return {
        one: text[match.end() : end].strip().rstrip(";")
        for match, end in zip(found, ends, strict=True)
        for one in match[1].split(", ")
    }


def _takes(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{one}`" for one in get_args(kind))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}
    parts = get_args(kind) or (kind,)
    return ", ".join(names[one] for one in parts[:-1]) + " or " * (len(parts) > 1) + names[parts[-1]]


def policies() -> str:
    from recycler.routers.select import Policy

    return option_table(option_rows(Policy))


def kinds() -> str:
    """Every peft_type that is known, and what becomes of it."""
    methods()
    from recycler.zoo import kinds as known

    lines = ["| `peft_type` | what it is | what becomes of it | |", "|---|---|---|---|"]
    for name in ["LORA", "MISS", "BONE", "PSOFT", *known._TYPES]:
        kind = known.kind_of({"peft_type": name})
        needs = {"nothing": "", "shapes": ", needs the base's shapes", "weights": ", needs the base's weights"}[kind.needs]
        how = {"read": "read as it is", "refuse": "refused", "convert": f"converted{needs}"}[kind.how]
        loss = "without loss" if kind.lossless else "the error is measured and shown"
        why = kind.why if kind.how == "refuse" else loss if kind.how == "convert" else ""
        lines.append(f"| `{name}` | {kind.name} | {how} | {why} |")
    return "\n".join(lines)


# -- commands


def commands() -> str:
    """Every command, as a heading and its help."""
    import click

    from recycler.cli import main

    parts = []
    for path, command in leaves(main):
        with click.Context(command, info_name=path, terminal_width=WIDTH, help_option_names=["-h", "--help"]) as context:
            parts += [f"## `{path}`", f"```text\n{command.get_help(context)}\n```"]
    return "\n\n".join(parts)


def leaves(group: Any, path: str = "recycle") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


# -- text


def linked(text: str) -> str:
    """arXiv ids as links; in text that is not code."""
    text = re.sub(r"(?<![/\w])arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    return text.replace("|", "\\|") if "\n" not in text else text


def _one_line(text: str) -> str:
    return inspect.cleandoc(text).split("\n\n")[0].replace("\n", " ").split(". ")[0].strip().rstrip(".")
