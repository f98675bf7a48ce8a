"""Which methods there are, their options, and saved routers. A file of this folder that defines a router is a method.

Other packages add methods through the entry-point group ``recycler.routers`` (module = "module:Class"; see examples/my_router.py).
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from recycler.routers.base import SCHEMA_VERSION, Router
from recycler.zoo import formats
from recycler.zoo.documents import read_document
from recycler.zoo.errors import InputError, UsageError, choices


@cache
def methods() -> dict[str, type[Router]]:
    """Every method by name: the files of this folder, then the entry points of the group ``recycler.routers``.

    Raises:
        InputError: two of them have one name, or one has another than its file.
    """
    import recycler.routers as package

    found: dict[str, type[Router]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for cls in vars(module).values():
            if (
                inspect.isclass(cls)
                and issubclass(cls, Router)
                and cls.__module__ == module.__name__
                and not inspect.isabstract(cls)
            ):
                if info.name in found:
                    raise InputError(f"routers/{info.name}.py defines two routers.", "A file is one method.", "Split it.")
                found[info.name] = cls
    for point in entry_points(group="recycler.routers"):
        if point.name in found:
            raise InputError(f"Two routers are called {point.name}.", f"One is {point.value}.", "Rename or uninstall one.")
        found[point.name] = point.load()
        name = found[point.name].method()  # what its routers are saved as
        if name != point.name:
            raise InputError(
                f"The router {point.name} is defined in {name}.py.",
                "A method is called as its file, or what it saved could not be loaded.",
                f'Rename the entry point: {name} = "{point.value}"',
            )
    return dict(sorted(found.items()))


def find(name: str) -> type[Router]:
    """The class of a method.

    Raises:
        UsageError: there is no such method.
    """
    try:
        return methods()[name]
    except KeyError:
        raise UsageError(f"There is no router called {name!r}.", "", f"Choose {choices(methods())}.", code="E_METHOD") from None


def load_router(folder: str | Path) -> Router:
    """Reads a saved router.

    Raises:
        InputError: the folder holds none, its schema is newer, or its tensors do not fit its manifest.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    manifest = read_document(
        folder / "router.json",
        SCHEMA_VERSION,
        lambda said: [said[key] for key in ("method", "adapters", "config")],
        what="a router",
        make="Build one: recycle build-router METHOD --out DIR",
        again="Build the router again.",
        code="E_ROUTER",
    )
    cls = find(manifest["method"])
    router: Router = cls(manifest["adapters"], make_config(cls, manifest["config"]))
    router.report = manifest.get("report", {})
    own = {"schema_version", "method", "adapters", "config", "report"}
    router.facts = {k: v for k, v in manifest.items() if k not in own}
    try:
        router.derived = tuple(
            formats.read(folder / "adapters" / name, name)[0]
            for name in router.adapters
            if (folder / "adapters" / name).is_dir()
        )
        router.restore(load_file(folder / "router.safetensors"))
        if (folder / "statistics.safetensors").exists():
            router.load_statistics(load_file(folder / "statistics.safetensors"))
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise InputError(
            f"The tensors in {folder} cannot be read ({error}).", "", "Build the router again.", code="E_ROUTER"
        ) from None
    return router


def options(cls: type[Router]) -> dict[str, tuple[Any, Any]]:
    """Name → (type, default) of a method's Config."""
    hints = get_type_hints(cls.Config)
    return {f.name: (hints[f.name], f.default) for f in dataclasses.fields(cls.Config)}


def make_config(cls: type[Router], given: Mapping[str, Any]) -> Any:
    """A Config from keywords, or from the strings of ``-o key=value``.

    Raises:
        UsageError: an unknown key (all choices are listed) or a value of the wrong type.
    """
    known = options(cls)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UsageError(
            f"{cls.method()} has no option {', '.join(map(repr, unknown))}.",
            "",
            "Its options: " + ", ".join(f"{k}={v}" for k, (_, v) in known.items()) + ".",
            code="E_OPTION",
        )
    return cls.Config(**{key: _convert(key, value, known[key][0]) for key, value in given.items()})


def _convert(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`; strings are read as the command line gives them."""
    kinds = get_args(kind) if get_origin(kind) is not None and get_origin(kind) is not Literal else (kind,)
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if type(None) in kinds:
            return None
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif bool in kinds:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    else:
        for target in kinds:
            if target in (int, float, str) and not isinstance(value, bool):
                try:
                    if target is not int or float(value) == int(value):
                        return target(value)
                except (ValueError, TypeError, OverflowError):
                    continue
    name = " or ".join(getattr(k, "__name__", str(k)).replace("NoneType", "none") for k in kinds)
    raise UsageError(f"{key}={value!r} is not what {key} takes.", f"It takes {name}.", "", code="E_OPTION")
