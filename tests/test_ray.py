"""Work shared by workers of a real Ray cluster: the same bits as without it, whoever dies on the way; bases and adapters are loaded
once by each, and nothing else travels than what has to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import Pico
from torch import Tensor

import recycler
from recycler import Profile, Shots
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.cli import main
from recycler.routed import RoutedModel
from recycler.scoring import Fitting
from recycler.shots import Shot
from recycler.updating import add_adapter
from recycler.workers import connect
from recycler.zoo.errors import InputError, RecycleError, UsageError
from recycler.zoo.similarity import Similarity, compare
from recycler.zoo.survey import survey

ray = pytest.importorskip("ray")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find this file

NAMES = ("code", "law", "math", "poem")
ROWS, TOTAL = 12, 12 * 4 * 5


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two CPUs, and an object store that a few bases would overflow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(num_cpus=2, object_store_memory=80 * 2**20, **options)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def workers(cluster: None, llama: Pico) -> Iterator[Any]:
    """Two of them, for all tests that need no others."""
    with connect("ray", recycler.Zoo(llama.zoo)) as found:
        yield found


class Steps:
    """A progress that remembers steps, and calls `at` with how many were done."""

    def __init__(self, at: Callable[[int], None] = lambda done: None) -> None:
        self.announced: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.notes: set[str] = set()
        self.at = at

    def __call__(self, steps: int, what: str) -> Callable[..., None]:
        self.announced[what], self.done[what] = steps, 0

        def step(count: int = 1, note: str = "") -> None:
            self.done[what] += count
            self.notes.add(note)
            self.at(self.done[what])

        return step


def long(task: str, i: int) -> Shot:
    return Shot(f"{task} {i}: " + "the long, long poem of " * 6, f" {task[i % 3]}{i}")


SHOTS = Shots({task: [long(task, i) for i in range(ROWS)] for task in NAMES})


@pytest.fixture(scope="module")
def here(llama: Pico) -> Profile:
    """Without workers."""
    return recycler.profile(recycler.Zoo(llama.zoo), SHOTS, ROWS, generate=True)


def profiled(llama: Pico, engine: Any, **options: Any) -> Profile:
    return recycler.profile(recycler.Zoo(llama.zoo), SHOTS, ROWS, engine=engine, **options)


def tensors(router: recycler.Router) -> dict[str, Tensor]:
    return router.tensors()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_same_profile(llama: Pico, here: Profile, workers: Any, tmp_path: Path) -> None:
    steps = Steps()
    there = profiled(llama, workers, generate=True, out=tmp_path / "p", progress=steps)
    assert torch.equal(there.nll, here.nll) and here.exact is not None and there.exact is not None
    assert torch.equal(there.exact, here.exact) and there.key == here.key
    assert steps.announced == steps.done == {"scoring": TOTAL, "answering": TOTAL}
    assert steps.notes <= {"1 worker", "2 workers"} and "2 workers" in steps.notes
    assert not (tmp_path / "p" / "journal.jsonl").exists()


def test_the_same_routers_and_nothing_is_loaded_twice(llama: Pico, here: Profile, workers: Any) -> None:
    zoo, base = recycler.Zoo(llama.zoo), load_base(str(llama.base))
    gates = {"alone": True, "steps": 3, "rows": 8, "assign": {name: name for name in NAMES}}
    for method, profile, options in (("arrow", None, {}), ("phatgoose", here, gates)):
        alone = recycler.build_router(method, profile, zoo=zoo, base=base, **options)
        steps = Steps()
        shared = recycler.build_router(method, profile, zoo=zoo, base=base, engine=workers, progress=steps, **options)
        assert same(alone.tensors(), shared.tensors()) and tensors(shared), method
        assert alone.report.keys() == shared.report.keys() and list(steps.done.values()) == [4]
    census = workers.census()
    assert len({one["pid"] for one in census} | {os.getpid()}) == 3
    for one in census:
        assert one["bases"] == 1 and one["read"] % len(NAMES) == 0 and one["received"] == 0
    assert workers.sent == {}


def test_what_was_only_just_made_travels_once(llama: Pico, workers: Any) -> None:
    """Adapters that no folder holds: each is put into the object store once, for both workers."""
    zoo = recycler.Zoo(llama.zoo)
    alone = recycler.build_router("arrow", zoo=zoo, subtract=["law"])
    shared = recycler.build_router("arrow", zoo=zoo, subtract=["law"], engine=workers)
    assert same(alone.tensors(), shared.tensors())
    assert sorted(workers.sent) == ["code-minus-law", "math-minus-law", "poem-minus-law"]
    census = workers.census()
    assert all(one["bases"] == 1 for one in census) and {one["received"] for one in census} <= {0, 3}


def norms(model: Fitting, name: str) -> tuple[int, float]:
    total = sum(float(model.factors(site)[name].b_OR.norm()) for site in model.sites if name in model.factors(site))
    return os.getpid(), total


def test_a_zoo_that_workers_cannot_read(llama: Pico, workers: Any, tmp_path: Path) -> None:
    zoo = recycler.Zoo(shutil.copytree(llama.zoo, tmp_path / "zoo"))
    base = load_base(str(llama.base))
    model = RoutedModel(base, read_adapters(zoo, NAMES, base))
    shutil.rmtree(zoo.folder("math"))
    shutil.rmtree(zoo.folder("poem"))
    shutil.copytree(zoo.folder("law"), zoo.folder("poem"))  # not the one that was meant
    before, workers.zoo = workers.zoo, zoo
    received = sum(one["received"] for one in workers.census())
    try:
        found = Fitting(model, workers=workers).map(norms, NAMES * 20, "norms")
    finally:
        workers.zoo = before
        model.engine.detach()
    expected = [norms(Fitting(model), name)[1] for name in NAMES]
    assert [total for _, total in found] == expected * 20
    pids = {pid for pid, _ in found}
    assert pids <= {one["pid"] for one in workers.census()} and os.getpid() not in pids
    assert sorted(workers.sent) == ["math", "poem"]  # one reference each, however many workers
    assert sum(one["received"] for one in workers.census()) - received == 2 * len(pids)


def kills(workers: Any, at: int) -> Callable[[int], None]:
    """Ends a worker, as the system does when memory is short, once so many steps are done."""
    left = [workers.census()[0]["pid"]]

    def now(done: int) -> None:
        if done >= at and left:
            os.kill(left.pop(), signal.SIGKILL)

    return now


def test_a_worker_is_killed(llama: Pico, here: Profile, workers: Any, tmp_path: Path) -> None:
    before = {one["pid"] for one in workers.census()}
    steps = Steps(kills(workers, TOTAL // 4))
    there = profiled(llama, workers, generate=True, out=tmp_path / "p", progress=steps)
    assert torch.equal(there.nll, here.nll) and there.exact is not None and torch.equal(there.exact, here.exact)  # type: ignore[arg-type]
    assert steps.announced == steps.done == {"scoring": TOTAL, "answering": TOTAL}
    census = workers.census()
    assert len(census) == 2 and len(before & {one["pid"] for one in census}) == 1


def bits(similarity: Similarity) -> tuple[tuple[str, ...], tuple[float, ...], bytes]:
    return similarity.names, similarity.norms, similarity.cosine.numpy().tobytes()


def test_the_same_check(llama: Pico, workers: Any, tmp_path: Path) -> None:
    """The very same report, also of an adapter that cannot be read, and no base is loaded for it."""
    zoo = recycler.Zoo(shutil.copytree(llama.zoo, tmp_path / "zoo"))
    for name in ("math", "law"):
        zoo.add(shutil.copytree(zoo.folder(name), tmp_path / name), f"{name}-again")
    (zoo.folder("poem") / "adapter_model.safetensors").write_bytes(b"spoilt")
    before = {one["pid"]: one["bases"] for one in workers.census()}
    alone, steps = recycler.check(zoo, llama.base), Steps()
    for _ in range(2):  # the second time workers are here already
        shared = recycler.check(zoo, llama.base, engine=workers, progress=steps)
        assert json.dumps(shared.to_json()) == json.dumps(alone.to_json())
        assert bits(shared.similarity) == bits(alone.similarity)
    (section,) = shared.sections
    assert [(one.name, one.verdict) for one in section.unusable] == [("poem", "unreadable")] and len(section.adapters) == 6
    assert steps.announced == steps.done and steps.done["reading"] == 6 and "2 workers" in steps.notes
    assert all(one["bases"] == before.get(one["pid"], 0) for one in workers.census()) and workers.sent == {}
    shutil.rmtree(zoo.folder("poem"))
    shutil.copytree(recycler.Zoo(llama.zoo).folder("poem"), zoo.folder("poem"))
    mended = recycler.check(zoo, llama.base, engine=workers)
    assert not mended.sections[0].unusable and bits(mended.similarity) == bits(compare(zoo))


def test_a_check_whose_worker_is_killed(llama: Pico, workers: Any) -> None:
    """In the middle of the comparison, of which every site is an item; the adapters travel, once."""
    zoo = recycler.Zoo(llama.zoo)
    adapters = {name: zoo[name] for name in zoo}
    sites = len({path for one in adapters.values() for path in one.sites})
    before = {one["pid"] for one in workers.census()}
    steps = Steps(kills(workers, len(adapters) + 1))
    assert sites > len(adapters) + 1
    shared = survey(adapters, list(adapters), memory=1.0, workers=workers, progress=steps)
    assert bits(shared.similarity) == bits(compare(zoo))
    assert steps.announced == steps.done == {"reading": len(adapters), "comparing": sites}
    assert sorted(workers.sent) == sorted(adapters)
    census = workers.census()
    assert len(census) == 2 and len(before & {one["pid"] for one in census}) == 1
    assert all(one["received"] for one in census if one["pid"] in before)


def once(model: Fitting, item: tuple[Path, int]) -> int:
    """Dies of its first item, halfway."""
    flag, number = item
    if number == 0 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def refuses(model: Fitting, item: int) -> int:
    if item == 2:
        raise InputError("Two.", "It is even.", "Take three.", code="E_RANK")
    return item


def test_work_that_kills_and_work_that_refuses(llama: Pico, workers: Any, tmp_path: Path) -> None:
    base = load_base(str(llama.base))
    fitting = Fitting(RoutedModel(base, read_adapters(recycler.Zoo(llama.zoo), NAMES, base)), workers=workers)
    assert fitting.map(once, [(tmp_path / "flag", n) for n in range(9)], "squares") == [n * n for n in range(9)]
    assert (tmp_path / "flag").exists()
    for some in (fitting, Fitting(fitting.model)):
        with pytest.raises(InputError, match=r"Two\. It is even\. Take three\.") as caught:
            some.map(refuses, range(4), "numbers")
        assert caught.value.code == "E_RANK"
    assert fitting.map(refuses, [5, 1], "numbers") == [5, 1] and fitting.map(refuses, [], "nothing") == []


def test_an_interrupted_run_goes_on_without_workers(llama: Pico, here: Profile, workers: Any, tmp_path: Path) -> None:
    def stop(done: int) -> None:
        if done > TOTAL // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profiled(llama, workers, out=tmp_path / "p", progress=Steps(stop))
    assert [file.name for file in (tmp_path / "p").iterdir()] == ["journal.jsonl"]
    steps = Steps()
    there = profiled(llama, None, out=tmp_path / "p", progress=steps)
    assert torch.equal(there.nll, here.nll)
    assert 0 < steps.announced["scoring"] == steps.done["scoring"] < TOTAL and steps.notes == {""}


def dies(model: Fitting, item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_work_that_kills_again_and_again(llama: Pico, workers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recycler.ray_workers._TRIES", 0)  # each takes a new worker, which takes seconds
    base = load_base(str(llama.base))
    fitting = Fitting(RoutedModel(base, read_adapters(recycler.Zoo(llama.zoo), NAMES, base)), workers=workers)
    with pytest.raises(RecycleError, match=r"Workers die, or cannot be started\..*memory") as error:
        fitting.map(dies, [0], "deaths")
    assert error.value.code == "E_CLUSTER"


def test_workers_that_are_gone(llama: Pico, workers: Any, tmp_path: Path) -> None:
    """The command line has its own; and what it is given to do is done."""
    workers.close()
    given = ["--zoo", str(llama.zoo), "--base", str(llama.base), "--engine", "ray"]
    done = CliRunner().invoke(main, ["build-router", "arrow", "--out", str(tmp_path / "a"), "--adapters", "law", *given])
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "a"), done.output
    done = CliRunner().invoke(main, ["zoo", "check", "--json", *given])
    assert done.exit_code == 0 and "comparing" in done.stderr and "worker" in done.stderr, done.output
    assert json.loads(done.stdout) == recycler.check(recycler.Zoo(llama.zoo), llama.base).to_json()
    assert ray.is_initialized()  # this cluster is not the command's to end
    alone = recycler.build_router("arrow", zoo=recycler.Zoo(llama.zoo), adapters=["law"])
    assert same(recycler.load_router(tmp_path / "a").tensors(), alone.tensors())


def test_a_cluster_without_room(llama: Pico, cluster: None) -> None:
    zoo, threads = recycler.Zoo(llama.zoo), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(
            RecycleError, match=r"No machine of the cluster has 3 CPUs\..*OMP_NUM_THREADS to less than 3"
        ) as error:
            recycler.build_router("arrow", zoo=zoo, engine="ray")
    finally:
        torch.set_num_threads(threads)
    assert error.value.code == "E_CLUSTER"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda zoo: recycler.profile(zoo, SHOTS, 1, engine="spark"), r"no engine 'spark'\. .*ray://HOST:PORT"),
        (lambda zoo: recycler.profile(zoo, SHOTS, 1, engine="ray://head"), r"no engine 'ray://head'"),
        (lambda zoo: recycler.check(zoo, engine="dask"), r"no engine 'dask'\. .*ray://HOST:PORT"),
        (lambda zoo: recycler.build_router("uniform", zoo=zoo, engine="ray"), r"uniform has no work that workers could share"),
        (lambda zoo: recycler.build_router("auto", "p", zoo=zoo, engine="ray"), r"auto has no work that workers could share"),
    ],
)
def test_what_it_refuses(llama: Pico, call: Callable[[recycler.Zoo], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(recycler.Zoo(llama.zoo))


def test_without_the_package(llama: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"needs a package\. Run: pip install 'recycler\[ray\]'") as error:
        recycler.build_router("arrow", zoo=recycler.Zoo(llama.zoo), engine="ray")
    assert error.value.code == "E_MISSING_EXTRA"


def test_gates_that_learn_alone(llama: Pico, here: Profile) -> None:
    """Nobody's gates depend on who else is there: with fewer adapters those of the others are the same, and so are those added later."""
    zoo, options = recycler.Zoo(llama.zoo), {"alone": True, "steps": 3, "rows": 8, "lr": 0.1}
    four = recycler.build_router("phatgoose", here, zoo=zoo, assign={name: name for name in NAMES}, **options)
    some = recycler.build_router("phatgoose", here, zoo=zoo, adapters=NAMES[1:], assign={n: n for n in NAMES[1:]}, **options)
    late = recycler.build_router("phatgoose", here, zoo=zoo, adapters=NAMES[:3], assign={n: n for n in NAMES[:3]}, **options)
    late = add_adapter(late, "poem", here, zoo=zoo, assign={"poem": "poem"})
    together = recycler.build_router("phatgoose", here, zoo=zoo, assign={n: n for n in NAMES}, **options | {"alone": False})
    for site, rows in four.rows.items():  # type: ignore[attr-defined]
        torch.testing.assert_close(late.rows[site].v_ED, rows.v_ED, atol=1e-4, rtol=1e-4)  # type: ignore[attr-defined]
        if site in some.rows:  # type: ignore[attr-defined]
            torch.testing.assert_close(some.rows[site].v_ED, rows.v_ED[1:], atol=1e-4, rtol=1e-4)  # type: ignore[attr-defined]
    assert not same(four.tensors(), together.tensors())
