"""Zoos larger than memory: adapters lie packed on disk, and those that are used are in memory, up to a budget.

    disk (`packed`) → host memory → the device

On a CPU the last two are one. On CUDA what was read waits in pinned memory under a budget of its own, and is copied on a stream of its
own. What is held, and evicted, is one group of one adapter: a page. The budget counts pages and the stacks that were made of them.
Where a mixture holds for a sequence stacks go last, because every token asks for them again; where tokens are routed they go first.
Beyond the budget comes what is in use at the moment: one group's pages and its stack.

Gates are always in memory. A mixture that holds for a sequence is known before the first layer runs, so that pages are read some
groups ahead, in a thread. Where tokens are routed, a group's weights say who is needed (the one wait for the device that this costs),
and the gate of the same group one layer up, given this layer's hidden state, guesses who will be: a miss is read when it happens, so
that answers are those of the model that holds everything.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recycler.engine.packed import Packed, slabs
from recycler.engine.stack import Slab, Stack
from recycler.routers.linear import LinearGate
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from recycler.engine.bank import Bank

Key = tuple[str, int]  # group, adapter
AHEAD = 4  # groups; about one layer
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(size: int | str) -> int:
    """Bytes, from a number of them or a text such as "2GB", "1.5 GiB" or "500M".

    Raises:
        UsageError: it is neither, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(size), re.IGNORECASE)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or isinstance(size, bool) or float(found[1]) * unit < 1:
        raise UsageError(
            f"resident={size!r} is no size.",
            "It says how much memory adapters may take.",
            'Give bytes, or a text such as "2GB" or "1.5GiB".',
            code="E_MEMORY",
        )
    return int(float(found[1]) * unit)


@dataclass
class Page:
    """One group of one adapter in memory.

    Attributes:
        ready: where it is on CUDA, when its copy is done. fresh: it was read ahead, and nobody has asked for it yet.
    """

    buffer: Tensor
    ready: torch.cuda.Event | None = None
    fresh: bool = False


@dataclass
class Made:
    """A group's stack, who is in it, and their numbers as a tensor; no stack where nobody has anything there.

    Attributes:
        lasting: the next token will ask for the same. size: bytes. copies: how many tables and padded copies, which some paths have it make, are in that.
    """

    used: tuple[int, ...]
    stack: Stack | None
    numbers_E: Tensor
    lasting: bool
    size: int = 0
    copies: int = -1

    def measure(self) -> None:
        """Finds its size, if that may have changed."""
        if self.stack is None or self.copies == (now := len(self.stack._padded) + (self.stack._tables is not None)):
            return
        copies = [part for pair in self.stack._padded.values() for part in pair] + [*(self.stack._tables or ())]
        self.size, self.copies = sum(part.nbytes for part in (*self.stack.buffers(), *copies)), now


class Tier:
    """Pages by least recent use, and stacks, in one kind of memory. Not safe for threads by itself."""

    def __init__(self, budget: int) -> None:
        self.budget, self.evicted = budget, 0
        self.pages: OrderedDict[Key, Page] = OrderedDict()
        self.made: OrderedDict[str, Made] = OrderedDict()
        self.held = self.fresh = 0  # bytes; fresh ones are those of pages that were read ahead for nobody so far

    def get(self, key: Key) -> Page | None:
        page = self.pages.get(key)
        if page is not None:
            self.pages.move_to_end(key)
        return page

    def use(self, page: Page) -> bool:
        """Whether it was still fresh."""
        was, page.fresh = page.fresh, False
        self.fresh -= page.buffer.nbytes * was
        return was

    def put(self, key: Key, page: Page) -> None:
        self._drop(key)
        self.pages[key] = page
        self.held += page.buffer.nbytes
        self.fresh += page.buffer.nbytes * page.fresh
        self.shrink()

    def keep(self, name: str, made: Made) -> None:
        """The stack that was used last."""
        self.held -= made.size if self.made.get(name) is made else 0
        made.measure()
        self.made[name] = made
        self.made.move_to_end(name)
        self.held += made.size
        self.shrink()

    def forget(self, name: str) -> None:
        made = self.made.pop(name, None)
        self.held -= 0 if made is None else made.size

    def shrink(self) -> None:
        passing = [name for name, made in self.made.items() if not made.lasting] if self.held > self.budget else []
        while self.held > self.budget and passing:
            self.forget(passing.pop(0))
        while self.held > self.budget and self.pages:
            self.evicted += 1
            self._drop(next(iter(self.pages)))
        while self.held > self.budget and self.made:
            self.forget(next(iter(self.made)))

    def _drop(self, key: Key) -> None:
        page = self.pages.pop(key, None)
        if page is not None:
            self.use(page)
            self.held -= page.buffer.nbytes


class Shelf:
    """All packed adapters of one model, in the order of weights, and what of them is in memory.

    Args:
        resident: bytes that adapters may take where they run. host: the same for pinned memory, where they run on CUDA; as
            `resident` where None.

    Attributes:
        hits, ahead, misses: pages that a stack was made of: those that were there, those that were there because they had been
            read ahead, and those that it had to wait for. A stack that serves again asks for none.
        bytes_read: from disk, read ahead or not.
    """

    def __init__(self, packed: Sequence[Packed], resident: int, host: int | None = None) -> None:
        self.packed = tuple(packed)
        self.tier, self._pinned = Tier(resident), Tier(resident if host is None else host)
        self.hits = self.ahead = self.misses = self.bytes_read = 0
        self._banks: list[Bank] = []
        self._pages = 0
        self._next: dict[str, list[Bank]] = {}
        self._upper: dict[str, Bank] = {}
        self._lock = threading.RLock()
        self._flying: dict[Key, tuple[Future[Page], int]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recycler-pages")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    # -- what it says of itself

    @property
    def sites(self) -> tuple[str, ...]:
        """Module paths that at least one adapter touches."""
        return tuple(dict.fromkeys(site for one in self.packed for site in one.sites))

    @property
    def size(self) -> int:
        """Bytes of all adapters, on disk."""
        return sum(one.size for one in self.packed)

    @property
    def held(self) -> int:
        """Bytes in memory now, pinned ones included."""
        return self.tier.held + self._pinned.held

    @property
    def evicted(self) -> int:
        """Pages that went, from where they run, to make room."""
        return self.tier.evicted

    @property
    def hit_rate(self) -> float:
        """The share of pages that were still held; 0 before the first."""
        return self.hits / max(self.hits + self.ahead + self.misses, 1)

    def __str__(self) -> str:
        asked = self.hits + self.ahead + self.misses
        return (
            f"{len(self.packed)} adapters, {_shown(self.size)} on disk, {_shown(self.tier.held)} of {_shown(self.tier.budget)} in memory; "
            f"of {asked} pages {self.hit_rate:.1%} were held, {self.ahead / max(asked, 1):.1%} read ahead and "
            f"{self.misses / max(asked, 1):.1%} waited for; {self.evicted} evicted, {_shown(self.bytes_read)} read"
        )

    # -- serving banks

    def arrange(self, banks: Sequence[Bank]) -> None:
        """Says in which order groups run."""
        self._banks = list(banks)
        self._pages = sum(bool(one.places(bank.group.sites)) for bank in banks for one in self.packed)
        roles: dict[Any, Bank] = {}
        for i, bank in reversed([*enumerate(banks)]):
            # After the last group the first runs again, for the next token.
            self._next[bank.group.name] = [banks[(i + n) % len(banks)] for n in range(1, min(AHEAD + 1, len(banks)))]
            role = (bank.group.stream, bank.group.width, *(site.rpartition(".")[2] for site in bank.group.sites))
            if role in roles:
                self._upper[bank.group.name] = roles[role]
            roles[role] = bank

    def promote(self, used: tuple[int, ...]) -> None:
        """Begins to read the first groups of adapters that a generation will use."""
        for bank in self._banks[:AHEAD]:
            self.prefetch(bank, used)

    def serve(self, bank: Bank, x_BTD: Tensor, w_BTSE: Tensor) -> tuple[Stack | None, Tensor | None]:
        """The stack of those who have a weight, and their numbers; (None, None) where nobody has, or has anything here.

        Raises:
            UsageError: the model is being compiled. InputError: a packed file is damaged.
        """
        if torch.compiler.is_compiling():
            raise UsageError(
                "A model that pages its adapters cannot be compiled.",
                "Who is read from disk depends on what the router decides.",
                "Load it without resident.",
                code="E_MEMORY",
            )
        few = bank.control.few
        used = few.used if few is not None else wanted(w_BTSE)
        found = self.stack(bank, used) if used else (None, None)
        if few is not None:
            for after in self._next.get(bank.group.name, ()):
                self.prefetch(after, used)
        elif bank.control.forced is None:
            self._guess(bank, x_BTD, used)
        return found

    @torch.inference_mode(False)
    @torch.no_grad()
    def stack(self, bank: Bank, used: tuple[int, ...]) -> tuple[Stack | None, Tensor | None]:
        """Some of the adapters, stacked in the given order, where and in what dtype the bank runs; and their numbers. The last one
        of each group is kept: the forwards of a generation, and batches of the same task, ask for the same."""
        name, like = bank.group.name, bank.stack.a_RD
        with self._lock:
            made = self.tier.made.get(name)
            if made is not None and made.used == used and _placed(made, like):
                self.tier.keep(name, made)
                return made.stack, None if made.stack is None else made.numbers_E
            self.tier.forget(name)
        parts: list[dict[int, Slab]] = [{} for _ in bank.group.sites]
        for number, e in enumerate(used):
            places = self.packed[e].places(bank.group.sites)
            if places:
                for s, slab in slabs(self._page((name, e), bank, like.device).buffer, places, like.dtype).items():
                    parts[s][number] = slab
        stack = Stack(parts, len(used), (like.device, like.dtype), bank.stack.widths) if any(parts) else None
        made = Made(used, stack, torch.tensor(used, dtype=torch.long, device=like.device), bank.control.few is not None)
        with self._lock:
            self.tier.keep(name, made)
        return stack, None if stack is None else made.numbers_E

    def slabs(self, bank: Bank, used: tuple[int, ...]) -> list[dict[int, Slab]]:
        """As `Stack.slabs` of a bank that has them all: per site, adapter → slab, of some adapters."""
        stack, _ = self.stack(bank, used)
        held = [dict[int, Slab]() for _ in bank.group.sites] if stack is None else stack.slabs()
        return [{used[number]: one for number, one in some.items()} for some in held]

    def prefetch(self, bank: Bank, used: tuple[int, ...]) -> None:
        """Has pages read in the background. Never more than fill half the budget wait there for their first use."""
        name, made = bank.group.name, self.tier.made.get(bank.group.name)
        if made is not None and made.used == used:  # asked at every group of every token: without the lock
            return
        device = bank.stack.a_RD.device
        with self._lock:
            for e in used:
                key = (name, e)
                if key in self.tier.pages or key in self._flying:
                    continue
                size = sum(place.size for _, place in self.packed[e].places(bank.group.sites))
                if not size:
                    continue
                if 2 * (self.tier.fresh + sum(size for _, size in self._flying.values()) + size) > self.tier.budget:
                    return
                self._flying[key] = (self._thread.submit(self._fly, key, bank, device), size)

    def _guess(self, bank: Bank, x_BTD: Tensor, used: tuple[int, ...]) -> None:
        """Reads ahead for a group that repeats this one's decision, and for the same group one layer up: its gate, given what this
        layer reads. Gates that look at more than their input are left alone."""
        if len(self.tier.pages) == self._pages:  # whatever it is, it is there
            return
        for after in self._next.get(bank.group.name, ()):
            if after._leader and after._leader[0] is bank:
                self.prefetch(after, used)
        upper, select = self._upper.get(bank.group.name), bank.control.select
        if upper is not None and isinstance(upper.gate, LinearGate) and select is not None:
            with torch.no_grad():
                self.prefetch(upper, wanted(select(upper.gate(x_BTD, bank.control.plan), upper.group)))

    # -- pages

    def _page(self, key: Key, bank: Bank, device: torch.device) -> Page:
        """A page, waited for if need be."""
        with self._lock:
            page = self.tier.get(key)
            flying = None if page is not None else self._flying.get(key)
            if page is not None and page.buffer.device == device:
                if self.tier.use(page):
                    self.ahead += 1
                else:
                    self.hits += 1
            elif flying is not None and flying[0].cancel():  # it has not begun: faster than to wait in a row
                del self._flying[key]
                page = flying = None
            else:
                page = None
        if flying is not None:
            page = flying[0].result()
            with self._lock:
                self.ahead += 1
                self.tier.use(page)
        if page is None or page.buffer.device != device:
            self.misses += 1
            page = self._load(key, bank, device, fresh=False)
        if page.ready is not None:
            torch.cuda.current_stream(device).wait_event(page.ready)
            page.buffer.record_stream(torch.cuda.current_stream(device))
        return page

    def _fly(self, key: Key, bank: Bank, device: torch.device) -> Page:
        try:
            return self._load(key, bank, device, fresh=True)
        finally:
            with self._lock:
                self._flying.pop(key, None)

    def _load(self, key: Key, bank: Bank, device: torch.device, fresh: bool) -> Page:
        """From disk, or from pinned memory."""
        with self._lock:
            kept = self._pinned.get(key)
        if kept is None:
            one, cuda = self.packed[key[1]], device.type == "cuda"
            kept = Page(one.read([place for _, place in one.places(bank.group.sites)], pinned=cuda))
            with self._lock:
                self.bytes_read += kept.buffer.nbytes
                if device.type != "cpu":
                    self._pinned.put(key, kept)
        page = Page(kept.buffer, None, fresh) if device.type == "cpu" else self._copied(kept.buffer, device, fresh)
        with self._lock:
            self.tier.put(key, page)
        return page

    def _copied(self, buffer: Tensor, device: torch.device, fresh: bool) -> Page:
        """A page on the device; on CUDA the copy runs beside everything else."""
        if device.type != "cuda":
            return Page(buffer.to(device), None, fresh)
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        with torch.cuda.stream(stream):
            moved = buffer.to(device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(stream)
        return Page(moved, ready, fresh)


def wanted(w_BTSE: Tensor) -> tuple[int, ...]:
    """The adapters that any token gives a weight, read from the device; all of them where weights are trained."""
    if w_BTSE.requires_grad:
        return tuple(range(w_BTSE.shape[-1]))
    return tuple((w_BTSE != 0).flatten(0, -2).any(0).nonzero()[:, 0].tolist())


def _placed(made: Made, like: Tensor) -> bool:
    """Whether a stack is where its bank is now, and of its dtype."""
    if made.stack is None:
        return made.numbers_E.device == like.device
    return made.stack.a_RD.device == like.device and made.stack.a_RD.dtype == like.dtype


def _shown(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
