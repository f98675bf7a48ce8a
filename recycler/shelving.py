"""Packing adapters for a model that pages them: once for each base and dtype, beside the zoo (`recycler.engine.packed`).

They lie in a folder of this machine, named after the hash of all that goes in, and not in a composed model's directory: what is
downloaded is checked against the adapters' own hashes, and a packed copy that came along would be past that check.

One adapter is in memory at a time while they are made; later loads only hash the adapters' files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from recycler.base import Base, fingerprint
from recycler.engine.packed import VERSION, Packed, write
from recycler.engine.sites import linear_shapes
from recycler.engine.stack import slab
from recycler.engine.tiers import Shelf, parse_size
from recycler.zoo import formats, inspect
from recycler.zoo.adapter import Adapter
from recycler.zoo.errors import UsageError
from recycler.zoo.match import place
from recycler.zoo.store import Zoo

AdapterDtype = Literal["int8"]


class Shelving:
    """Makes a shelf, adapter by adapter.

    Args:
        resident: how much memory adapters may take where they run: bytes, or a text such as "2GB".
        adapter_dtype: "int8" packs factors in it (`recycler.engine.quantised`: about 1 % of error); the base's dtype where None.
        packed: the folder; by default beside the default zoo, ``<zoo>-packed``. It can be deleted whenever no model uses it.

    Raises:
        UsageError: `resident` is no size, or `adapter_dtype` is unknown.
    """

    def __init__(
        self, resident: int | str, adapter_dtype: AdapterDtype | None = None, packed: str | Path | None = None
    ) -> None:
        self.resident = parse_size(resident)
        if adapter_dtype not in (None, "int8"):
            raise UsageError(
                f"adapter_dtype={adapter_dtype!r} is unknown.", "", "Choose int8, or leave it out.", code="E_MEMORY"
            )
        self.int8 = adapter_dtype == "int8"
        zoo = Zoo().path
        self.folder = zoo.with_name(f"{zoo.name}-packed") if packed is None else Path(packed).expanduser()
        self._packed: list[Packed] = []
        self._base: tuple[Base, str] | None = None

    @classmethod
    def of(cls, resident: int | str | None, adapter_dtype: AdapterDtype | None, packed: str | Path | None) -> Shelving | None:
        """As the class; None where nothing is to be paged.

        Raises:
            UsageError: as the class; or options are given that need `resident`.
        """
        if resident is not None:
            return cls(resident, adapter_dtype, packed)
        if adapter_dtype is not None or packed is not None:
            raise UsageError(
                f"{'packed' if adapter_dtype is None else 'adapter_dtype'} needs resident.",
                "Adapters that are all in memory are kept as they run.",
                'Add resident="2GB", say.',
                code="E_MEMORY",
            )
        return None

    def add(self, base: Base, folder: Path, name: str) -> Adapter:
        """The next adapter, without its factors: packed, if it is not yet.

        Raises:
            InputError: it cannot be read, does not fit the base, or its packed file is damaged. SecurityError: as `formats.read`.
            UsageError: the folder for packed files cannot be written.
        """
        inspect.check_folder(folder)
        sha256 = inspect.hashes(folder / inspect.WEIGHTS)[0]
        path = self.folder / f"{self._key(base, folder, sha256)}.safetensors"
        if not path.exists():
            adapter, _ = formats.read(folder, name)
            self._write(path, base, adapter)
        one = Packed(path)
        self._packed.append(one)
        licence = inspect.card_licence(folder)
        return Adapter(name, {}, one.adapter["base"], str(folder), None, sha256, licence)

    def shelf(self) -> Shelf:
        """What was added, in that order."""
        return Shelf(self._packed, self.resident)

    def _key(self, base: Base, folder: Path, sha256: str) -> str:
        if self._base is None or self._base[0] is not base:
            self._base = (base, f"{fingerprint(base.model)} {base.model.dtype}")
        config = hashlib.sha256((folder / inspect.CONFIG).read_bytes()).hexdigest()  # it says how the weights are scaled
        return hashlib.sha256(f"{VERSION} {sha256} {config} {self._base[1]} {self.int8}".encode()).hexdigest()

    def _write(self, path: Path, base: Base, adapter: Adapter) -> None:
        placed = place(adapter, linear_shapes(base.model))
        modules = [(site, module) for site, module in base.model.named_modules() if site in placed]
        made = {site: slab(placed[site], module) for site, module in modules}
        try:
            write(path, made, {"base": adapter.base}, int8=self.int8)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be written: {error.strerror or error}.",
                "Adapters that are paged are packed once, beside the zoo.",
                "Make room there, or name another folder with packed=.",
                code="E_MEMORY",
            ) from error
