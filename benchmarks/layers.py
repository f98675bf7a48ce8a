"""The rows of `engine.py` that need one linear and not a model: layouts, mixtures by sequence, memory, prototypes.

Dimensions in names: N token, D input width, O output width, B sequence, E adapter, R rank row.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import peers
import torch
from peers import ARROW, BASE, LOOP, OURS, interleaved
from report import DTYPES, Claim, Row


def layer_rows(shape: Mapping[str, int], count: int, tokens: int, repeats: int) -> list[Row]:
    """C11 to C13, on one linear of the model's width to its MLP's."""
    d, o = shape["hidden_size"], shape["intermediate_size"]
    with torch.no_grad():
        return [padding_row(d, o, tokens, repeats), sequence_row(d, o, count, repeats), largest_row(d, o, count, tokens)]


def _one(d: int, o: int, ranks: Sequence[int]) -> list[Any]:
    return peers.make_adapters({"proj": (o, d)}, ranks)


def padding_row(d: int, o: int, tokens: int, repeats: int) -> Row:
    claims = []
    for name, dtype in DTYPES.items():
        x = torch.randn(1, tokens, d).to(dtype)
        mixed = _one(d, o, peers.MIXED)
        runs = {}
        for who, adapters in (("concatenated", mixed), ("padded", peers.padded(mixed))):
            linear, engine = peers.one_linear(d, o, dtype, adapters)
            engine.control.path = "dense"  # what is compared is the layout
            runs[who] = (lambda linear=linear, x=x: linear(x), 3)
        found = interleaved(runs, 2 * repeats)
        claims.append(Claim(f"{name} × padded", found["concatenated"] / found["padded"], 0.68))
    measure = f"a linear {d} → {o}, ranks 4,4,8,8,16,16,32,64, {tokens} tokens: ranks concatenated, × all padded to 64"
    return Row("C11", measure, tuple(claims), "padding, as vLLM does: 1.0")


def sequence_row(d: int, o: int, count: int, repeats: int, sequences: int = 8, tokens: int = 64, k: int = 4) -> Row:
    claims, anchors = [], []
    adapters = _one(d, o, [8] * count)
    for (name, dtype), most in zip(DTYPES.items(), (1.20, 1.40), strict=True):
        x = torch.randn(sequences, tokens, d).to(dtype)
        plain = peers.OneLinear(d, o, dtype)
        linear, engine = peers.one_linear(d, o, dtype, adapters, routes=False)
        held = [(a.sites["proj"].a_RD.T.to(dtype), a.sites["proj"].b_OR.T.to(dtype)) for a in adapters]
        with peers.per_sequence(engine, sequences, k) as w_BE:

            def loop(x=x, plain=plain, held=held, w_BE=w_BE) -> torch.Tensor:
                y = plain(x)
                for e, (a_DR, b_RO) in enumerate(held):
                    y = y + x @ a_DR @ b_RO * w_BE[:, e, None, None].to(y)
                return y

            if dtype == torch.float32:
                torch.testing.assert_close(linear(x), loop(), rtol=1e-4, atol=1e-4)
            runs = {
                BASE: (lambda x=x, plain=plain: plain(x), 3),
                OURS: (lambda x=x, linear=linear: linear(x), 3),
                LOOP: (loop, 1),
            }
            found = interleaved(runs, 2 * repeats)
        claims.append(Claim(f"{name} × base", found[OURS] / found[BASE], most))
        anchors.append(f"{name}: {LOOP} {found[LOOP] / found[BASE]:.2f}")
    return Row(
        "C12",
        f"a linear, {sequences} sequences of {tokens}, each with its own {k} of {count} adapters",
        tuple(claims),
        "; ".join(anchors),
    )


def largest_row(d: int, o: int, count: int, tokens: int) -> Row:
    """In units of what is allowed: tokens × the rows that are kept and the router's, or tokens × outputs."""
    linear, engine = peers.one_linear(d, o, torch.float32, _one(d, o, [8] * count))
    x, allowed, found = torch.randn(1, tokens, d), tokens * max((8 + 1) * count, o), {}
    for path in ("dense", engine.banks[0].foresee((1, tokens, d))[0]):
        engine.control.path = path
        linear(x)  # what is kept for later is not the forward's
        with peers.Largest() as seen:
            linear(x)
        found[path] = seen.numel / allowed
    chosen = [*found][-1]
    claims = tuple(
        Claim(f"× allowed, {path} path" + " (chosen)" * (path == chosen), value, 1.0) for path, value in found.items()
    )
    arrow = tokens * count * o / allowed
    return Row(
        "C13", f"the largest tensor of a forward, a linear, {count} adapters, {tokens} tokens", claims, f"{ARROW} {arrow:.1f}"
    )


def prototype_row(count: int, layers: int = 30, shape: Mapping[str, int] = peers.SMOLLM2) -> Row:
    """As Arrow is fitted: every adapter at every linear, one after the other."""
    from recycler.routers.arrow import prototype

    one = peers.sites_of(peers.bare({**shape, "num_hidden_layers": 1}))
    adapters = peers.make_adapters(one, [8] * count)
    updates = [adapter.sites[site] for site in one for adapter in adapters]
    prototype(updates[0])
    started = time.thread_time()
    for _ in range(layers):
        for update in updates:
            prototype(update)
    seconds = time.thread_time() - started
    worst = 0.0
    for site in one:
        update = adapters[0].sites[site]
        exact_D = torch.linalg.svd((update.b_OR.double() @ update.a_RD.double()), full_matrices=False).Vh[0]
        ours_D = prototype(update).double()
        worst = max(worst, float((ours_D - exact_D * torch.sign(ours_D @ exact_D)).abs().max()))
    started = time.thread_time()
    for update in updates:
        _power_iterations(update.a_RD, update.b_OR)
    theirs = (time.thread_time() - started) * layers
    claims = (Claim("seconds", seconds, 1.0), Claim("error of an entry, times 1e5", 1e5 * worst, 1.0))
    return Row(
        "C14",
        f"Arrow's prototypes, {count} adapters at {layers * len(one)} linears",
        claims,
        f"15 power iterations, as PEFT: {theirs:.2f} s",
    )


def _power_iterations(a_RD: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    """PEFT's way."""
    c_RR, v_D = b_OR.T @ b_OR, torch.randn(a_RD.shape[1])
    for _ in range(15):
        w_D = a_RD.T @ (c_RR @ (a_RD @ v_D))
        v_D = w_D / (w_D.norm() + 1e-8)
    return v_D
