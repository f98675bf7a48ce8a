#!/bin/sh
# The wheel, installed elsewhere and imported from outside the checkout: zoo/ and routers/ must have come along.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")  # absolute: another directory is entered below
here=$(pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m build --quiet --wheel --outdir "$work/dist" "$here" >/dev/null
"$python" -m pip install --quiet --no-deps --no-compile --target "$work/site" "$work"/dist/*.whl
cd "$work"
PYTHONPATH="$work/site" "$python" -P -c "
import importlib.metadata, os, recycler, recycler.engine.bank, recycler.zoo.store, recycler.routers.discovery as discovery
site = os.path.realpath('$work/site')
for module in (recycler, recycler.engine.bank, recycler.zoo.store, discovery):
    assert os.path.realpath(module.__file__).startswith(site), module.__file__
assert {'arrow', 'phatgoose', 'ridge', 'uniform'} <= set(discovery.methods()), discovery.methods()
assert os.path.exists(os.path.join(site, 'recycler', 'py.typed'))
assert os.path.exists(os.path.join(site, 'recycler', 'seeing', 'templates', 'report.html'))
assert not os.path.exists(os.path.join(site, 'zoo')) and not os.path.exists(os.path.join(site, 'routers'))
"
PYTHONPATH="$work/site" "$python" -P -m recycler.cli --version
echo "wheel: ok"
