"""Many adapters: what a hierarchy of gates loses and saves beside flat routing, and what approximate search of examples finds.

    python benchmarks/many_tasks.py            # about 8 minutes on a busy core
    python benchmarks/many_tasks.py --quick    # about a minute and a half

Nobody has 512 real adapters of SmolLM2, so that the eleven of examples/ are joined by others that are made of them, in turn:

    noise     one's factors and gate rows, each with normal noise of 0.3 of its own size
    gauge     one's factors in another basis, B G and G⁻¹ A: the same update, and the same gate row
    turned    one that reads another space: A P with P a signed permutation of the input, and so its row
    mix       a third of one and two thirds of another, in update and row

Shown is how scores, choices and loss of the two-level gate compare with those of the flat one over the *same* rows, and what a gate's
forward takes. Arrow's rows are computed from every adapter's own factors, real or made. Ridge is fitted on shots for the eleven real
ones, and rows of made ones are made like their factors; a zoo of 512 adapters with 512 different tasks would have rows that are less
alike, clusters that are less clear, and more to lose. What is not shown is therefore how many tasks can be told apart: a task here has
dozens of adapters that are nearly as good. "family" counts a choice as kept where it is another of the same origin.

choices: of the tokens' flat top-2 how many are among the hierarchy's. weight: Σ min(w, w') of the two mixtures. Tokens are those of the
kept test rows, each with its own adapter active; gates are those of `--layers`. gate time: thread time of all of these gates, one after
the other, flat and in clusters in turns, the least of some rounds. rows: gate rows that one token needs, of E (and of C middles).
NLL: mean over the test rows of the real adapters' tasks, all layers.

Search: prompts of the examples as MiniLM reads them, and copies of them with normal noise of 0.3 of their length, 16 for each adapter.
Queries are the test rows' prompts. found: of the exact ten nearest; same adapter: as the exact nearest example's.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from recycler.base import Base
    from recycler.routers.linear import LinearRouter
    from recycler.routers.protocol import Group
    from recycler.zoo.adapter import Adapter

EXAMPLES = Path(__file__).parent.parent / "examples"
NOISE, KINDS = 0.3, ("noise", "gauge", "turned", "mix")


def main() -> None:
    parser = argparse.ArgumentParser(description="Hierarchical gates and approximate search, beside flat ones.")
    parser.add_argument("--base", type=Path, default=Path(".demo/base"))
    parser.add_argument("--counts", default="16,128,512", help="how many adapters")
    parser.add_argument("--nll-counts", default="16,128", help="for which of them the whole model runs")
    parser.add_argument("--probes", default="1,2,4,8")
    parser.add_argument("--layers", default="1,10,19,28", help="whose gates are compared and timed")
    parser.add_argument("--rows", type=int, default=2, help="test rows of each task")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of adapters that are made")
    parser.add_argument("--search", default="16,128,512,4096", help="adapters whose examples are searched")
    parser.add_argument("--synthetic", default="512,4096,16384", help="gates of random families alone: how many adapters")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(".bench/many_tasks.csv"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.counts, arguments.nll_counts, arguments.probes = "16,64", "16", "1,4"
        arguments.layers, arguments.rows, arguments.search, arguments.synthetic = "10", 1, "16,128", "512,2048"

    import torch

    sys.path.insert(0, str(EXAMPLES))
    from get_base import get_base

    from recycler.base import load_base

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)

    for count in numbers(arguments.synthetic):
        note(synthetic(count))
    for row in search(numbers(arguments.search)):
        note(row)
    base = load_base(str(get_base(arguments.base)), dtype="float32")
    zoo = Real(base, arguments.rows, arguments.kinds.split(","))
    for count in numbers(arguments.counts):
        for row in zoo.compare(count, numbers(arguments.probes), numbers(arguments.layers)):
            note(row)
        if count in numbers(arguments.nll_counts):
            for row in zoo.losses(count, numbers(arguments.probes)):
                note(row)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="", encoding="utf8") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        table.writeheader()
        table.writerows(rows)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def fastest(*work: Callable[[], object], rounds: int = 7) -> list[float]:
    """Seconds of thread time of each, in turns, the least of the rounds."""
    best = [float("inf")] * len(work)
    for _ in range(rounds):
        for i, run in enumerate(work):
            started = time.thread_time()
            run()
            best[i] = min(best[i], time.thread_time() - started)
    return best


# -- gates alone


def synthetic(count: int, width: int = 576) -> dict[str, Any]:
    """One gate of rows around √E directions: what a forward takes, flat and with 4 clusters, one token and 512."""
    import torch

    from recycler.routers.hierarchy import ClusterGate, clustered
    from recycler.routers.linear import LinearGate, Rows

    torch.manual_seed(0)
    families = round(count**0.5)
    v_ED = torch.randn(families, width)[torch.arange(count) % families] + 0.7 * torch.randn(count, width)
    rows = Rows(v_ED / width**0.5)
    started = time.thread_time()
    label_E = clustered(rows, None, False, [f"a{e:06d}" for e in range(count)])
    seconds = time.thread_time() - started
    flat, two = LinearGate([rows], True, False), ClusterGate([rows], [label_E], 4, True, False)
    row: dict[str, Any] = {"part": "gate", "adapters": count, "probe": 4, "fit_s": seconds}
    for tokens in (1, 512):
        x = torch.randn(1, tokens, width)
        with torch.no_grad():
            a, b = fastest(partial(flat, x), partial(two, x))
        row |= {f"flat_us_{tokens}": 1e6 * a, f"hierarchy_us_{tokens}": 1e6 * b, f"ratio_{tokens}": b / a}
    member = two.get_buffer("member_0")
    row |= {"rows_share": (len(member) + 4 * member.shape[1]) / count, "bytes_ratio": (len(member) + count) / count}
    return row


# -- search


def search(counts: Sequence[int]) -> list[dict[str, Any]]:
    import faiss
    import torch

    from recycler.routers.requests import MINILM
    from recycler.routers.retrieval import index_of, searched
    from recycler.sentences import embed
    from recycler.shots import Shots

    faiss.omp_set_num_threads(1)
    known = [s.prompt for some in Shots.from_files(str(EXAMPLES / "tasks/kshot/*.jsonl")).values() for s in some]
    asked = [s.prompt for some in Shots.from_files(str(EXAMPLES / "tasks/test/*.jsonl")).values() for s in some[:20]]
    real_ND, queries_PD = embed(known, MINILM), embed(asked, MINILM)
    draw, result = torch.Generator().manual_seed(0), []
    for count in counts:
        which_N = torch.arange(16 * count) % len(real_ND)
        noise_ND = torch.randn(len(which_N), real_ND.shape[1], generator=draw) * NOISE / real_ND.shape[1] ** 0.5
        noise_ND[: len(real_ND)] = 0
        examples_ND = torch.nn.functional.normalize(real_ND[which_N] + noise_ND, dim=1)
        flat = index_of(examples_ND)
        exact = searched(flat, queries_PD, 10)[1]
        for kind in ("hnsw", "ivf"):
            started = time.perf_counter()
            index = index_of(examples_ND, kind)
            built = time.perf_counter() - started
            found = searched(index, queries_PD, 64)[1]
            one = queries_PD[:1]
            a, b = fastest(partial(searched, flat, one), partial(searched, index, one, 64), rounds=20)
            result.append(
                {
                    "part": f"search {kind}", "adapters": count, "examples": len(examples_ND), "fit_s": built,
                    "found": float((exact[:, :, None] == found[:, None, :10]).any(-1).float().mean()),
                    "same adapter": float((exact[:, 0] // 16 == found[:, 0] // 16).float().mean()),
                    "flat_us_1": 1e6 * a, "hierarchy_us_1": 1e6 * b, "ratio_1": b / a,
                }
            )  # fmt: skip
    return result


# -- real adapters, and those that are made of them


class Real:
    """The eleven adapters, ridge's gates for them, and test rows of their tasks."""

    def __init__(self, base: Base, rows: int, kinds: Sequence[str]) -> None:
        import torch

        import recycler
        from recycler.build import read_adapters
        from recycler.profiles import Profile
        from recycler.routed import RoutedModel
        from recycler.routers.ridge import Ridge, RidgeConfig
        from recycler.scoring import Fitting
        from recycler.shots import Shots

        self.base, self.kinds = base, kinds
        with tempfile.TemporaryDirectory() as folder:
            zoo = recycler.Zoo(folder)
            recycler.fetch(str(EXAMPLES / "adapters"), base=base.id, zoo=zoo).raise_for_failures()
            self.adapters = read_adapters(zoo, zoo.entries, base)
        names = [adapter.name for adapter in self.adapters]
        shots = Shots.from_files(*[str(EXAMPLES / f"tasks/kshot/{name}.jsonl") for name in names]).sample(8)
        test = Shots.from_files(*[str(EXAMPLES / f"tasks/test/{name}.jsonl") for name in names])
        self.rows = [(names.index(task), row) for task, some in test.items() for row in some[:rows]]
        profile = Profile(tuple(names), shots, torch.ones(len(names) + 1, len(shots), 8), assigned={n: (n,) for n in names})
        model = RoutedModel(base, self.adapters)
        fitting = Fitting(model)
        self.ridge = Ridge.fit(fitting, profile, RidgeConfig())
        self.inputs = self._inputs(fitting)
        self.order = [site for group in fitting.groups for site in group.sites]
        model.engine.detach()
        self.made: list[Made] = [Made(e, e, "real", e) for e in range(len(names))]

    def _inputs(self, model: Any) -> dict[str, tuple[Group, Tensor]]:
        """Site → its group and what it reads [N, D], of the test rows, each with its own adapter active."""
        import torch

        found: dict[str, list[Tensor]] = {}
        groups: dict[str, Group] = {}
        own_NE = torch.nn.functional.one_hot(torch.tensor([e for e, _ in self.rows]), len(model.adapters)).float()
        for part in model.batches([[row] for _, row in self.rows], 2048):
            batch = model.encode([[self.rows[i][1]] for i in part])

            def see(group: Group, x_BTD: Tensor, part: list[int] = part, batch: Any = batch) -> Tensor:
                found.setdefault(group.name, []).append(x_BTD[batch.mask_BT["input"]])
                groups[group.name] = group
                return own_NE[part][:, None, None, :]

            model.observe(batch, see)
        return {site: (groups[site], torch.cat(some)) for site, some in found.items()}

    def grown(self, count: int) -> list[Made]:
        """The first `count`, real ones first."""
        real = len(self.adapters)
        while len(self.made) < count:
            i = len(self.made)
            parent, other = (i - real) // len(self.kinds) % real, (i * 7 + 3) % real
            self.made.append(Made(parent, (other + (other == parent)) % real, self.kinds[(i - real) % len(self.kinds)], i))
        return self.made[:count]

    def routers(self, count: int, layers: Sequence[int] | None = None) -> dict[str, LinearRouter]:
        """Flat ones, ridge and Arrow, over `count` adapters; at some layers only."""
        import torch

        from recycler.routers.arrow import Arrow, prototype
        from recycler.routers.linear import Rows
        from recycler.routers.ridge import Ridge, RidgeConfig
        from recycler.routers.select import Policy

        made = self.grown(count)
        names = [one.name for one in made]
        wanted = [site for site in self.order if layers is None or any(f".layers.{layer}." in site for layer in layers)]
        ridge = {}
        for site in wanted:
            if site in self.ridge.rows:
                held = self.ridge.rows[site]
                pairs = [one.row(held.v_ED, held.offset_E) for one in made]
                ridge[site] = Rows(torch.stack([v for v, _ in pairs]), torch.stack([offset for _, offset in pairs]))
        arrow = {}
        for site in wanted:
            width = next(a.sites[site].a_RD.shape[1] for a in self.adapters if site in a.sites)
            v_ED, offset_E = torch.zeros(count, width), torch.full((count,), float("-inf"))
            for e, one in enumerate(made):
                factors = one.factors(self.adapters, site)
                if factors is not None:
                    v_ED[e], offset_E[e] = prototype(factors), 0.0
            arrow[site] = Rows(v_ED, offset_E)
        return {"ridge": Ridge(names, RidgeConfig(), ridge), "arrow": Arrow(names, Policy(), arrow)}

    def compare(self, count: int, probes: Sequence[int], layers: Sequence[int]) -> list[dict[str, Any]]:
        """Choices of two levels beside one, and what the gates take."""
        import torch

        from recycler.routers.hierarchy import Hierarchy, HierarchyConfig

        family_E = torch.tensor([one.parent if one.kind != "turned" else -one.number for one in self.grown(count)])
        result = []
        for local, flat in self.routers(count, layers).items():
            for probe in probes:
                two = Hierarchy.of(flat, HierarchyConfig(local=local, probe=probe))
                kept, families, weights, pairs = [], [], [], []
                for group, x_ND in self.inputs.values():
                    if not any(f".layers.{layer}." in group.name for layer in layers):
                        continue
                    a, b = flat.gate(group), two.gate(group)
                    if a is None or b is None:
                        continue
                    pairs.append((a, b, x_ND[None]))
                    with torch.no_grad():
                        s, t = a(x_ND[None]), b(x_ND[None])
                        w, v = flat.weights(s, group), two.weights(t, group)
                    top, best = s.topk(2).indices, t.topk(2).indices
                    kept.append((top[..., :, None] == best[..., None, :]).any(-1).float().mean())
                    families.append((family_E[top[..., 0]] == family_E[best[..., 0]]).float().mean())
                    weights.append(w.minimum(v).sum(-1).mean())
                row: dict[str, Any] = {"part": f"gates {local}", "adapters": count, "probe": probe}
                row |= {"choices": mean(kept), "family": mean(families), "weight": mean(weights)}
                for tokens in (1, 256):
                    with torch.no_grad():
                        one, other = fastest(partial(_run, pairs, 0, tokens), partial(_run, pairs, 1, tokens))
                    row |= {f"flat_us_{tokens}": 1e6 * one / len(pairs), f"hierarchy_us_{tokens}": 1e6 * other / len(pairs)}
                    row[f"ratio_{tokens}"] = other / one
                needed, there = zip(*[_rows_of(b, count) for _, b, _ in pairs], strict=True)
                row |= {"rows_share": mean(needed), "bytes_ratio": mean(there)}
                result.append(row)
        return result

    def losses(self, count: int, probes: Sequence[int]) -> list[dict[str, Any]]:
        """NLL of the test rows, flat and in clusters; the adapters' own, and of the bare base."""
        import torch

        from recycler.routed import RoutedModel
        from recycler.routers.hierarchy import Hierarchy, HierarchyConfig
        from recycler.scoring import mean_nll
        from recycler.zoo.adapter import Adapter as Holder

        made = self.grown(count)
        adapters = []
        for one in made:
            sites = {site: found for site in self.order if (found := one.factors(self.adapters, site)) is not None}
            adapters.append(Holder(one.name, sites))
        model = RoutedModel(self.base, adapters)
        shots, result = [row for _, row in self.rows], []
        own_NE = torch.nn.functional.one_hot(torch.tensor([e for e, _ in self.rows]), count).float()
        for name, weights in (("own adapter", own_NE), ("base", torch.zeros(len(shots), count))):
            result.append({"part": f"loss {name}", "adapters": count, "nll": mean(mean_nll(model, shots, weights))})
        for local, flat in self.routers(count).items():
            model.use(flat)
            result.append({"part": f"loss {local}", "adapters": count, "nll": mean(mean_nll(model, shots))})
            for probe in probes:
                model.use(Hierarchy.of(flat, HierarchyConfig(local=local, probe=probe)))
                nll = mean(mean_nll(model, shots))
                result.append({"part": f"loss {local}", "adapters": count, "probe": probe, "nll": nll})
        model.engine.detach()
        return result


def _run(pairs: Sequence[tuple[Any, Any, Tensor]], which: int, tokens: int) -> None:
    for pair in pairs:
        pair[which](pair[2][:, :tokens])


def _rows_of(gate: Any, count: int) -> tuple[float, float]:
    """(gate rows that one token needs, and that there are), in flat ones."""
    from recycler.routers.hierarchy import ClusterGate

    if not isinstance(gate, ClusterGate):
        return 1.0, 1.0
    tables = [gate.get_buffer(f"member_{s}") for s in range(gate.sites)]
    needed = [(len(t) + min(gate.probe, len(t)) * t.shape[1]) / count for t in tables]
    return mean(needed), mean([(len(t) + count) / count for t in tables])


def mean(values: Sequence[Any]) -> float:
    return float(sum(values) / len(values))


class Made:
    """One adapter that is made of real ones: its factors at a site, and its gate row."""

    def __init__(self, parent: int, other: int, kind: str, number: int) -> None:
        self.parent, self.other, self.kind, self.number = parent, other, kind, number
        self.name = f"a{number:04d}-{kind}"

    def draw(self, site: str) -> Any:
        import zlib

        import torch

        return torch.Generator().manual_seed(zlib.crc32(f"{self.number} {site}".encode()))

    def factors(self, real: Sequence[Adapter], site: str) -> Any:
        """None where it has none."""
        import torch

        from recycler.zoo.adapter import Factors

        own, other = real[self.parent].sites.get(site), real[self.other].sites.get(site)
        if self.kind == "mix":
            parts = [(w, one) for w, one in ((1 / 3, own), (2 / 3, other)) if one is not None]
            if not parts:
                return None
            return Factors(torch.cat([one.a_RD for _, one in parts]), torch.cat([w * one.b_OR for w, one in parts], 1))
        if own is None or self.kind == "real":
            return own
        draw = self.draw(site)
        if self.kind == "noise":
            return Factors(*(noisy(part, draw) for part in (own.a_RD, own.b_OR)))
        if self.kind == "gauge":
            g_RR = torch.linalg.qr(torch.randn(len(own.a_RD), len(own.a_RD), generator=draw)).Q
            return Factors(g_RR.T @ own.a_RD, own.b_OR @ g_RR)
        return Factors(turned(own.a_RD, draw), own.b_OR)

    def row(self, v_ED: Tensor, offset_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """(v [D], offset) out of the real ones' rows."""
        import torch

        offset_E = torch.zeros(len(v_ED)) if offset_E is None else offset_E
        v_D, offset = v_ED[self.parent], offset_E[self.parent]
        if self.kind == "mix":
            return (v_D + 2 * v_ED[self.other]) / 3, (offset + 2 * offset_E[self.other]) / 3
        if self.kind == "noise":
            return noisy(v_D, self.draw("row")), offset
        return (turned(v_D, self.draw("row")), offset) if self.kind == "turned" else (v_D, offset)


def noisy(tensor: Tensor, draw: Any) -> Tensor:
    import torch

    return tensor + NOISE * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=draw)


def turned(tensor: Tensor, draw: Any) -> Tensor:
    """Its last axis by a signed permutation, an orthogonal map."""
    import torch

    width = tensor.shape[-1]
    return tensor[..., torch.randperm(width, generator=draw)] * (torch.randint(2, (width,), generator=draw) * 2 - 1)


if __name__ == "__main__":
    main()
