"""Keeps tests off the network and out of the user's folders; the Hub's client reads this when imported."""

from __future__ import annotations

import os
import tempfile

_HOME = tempfile.mkdtemp(prefix="recycler-tests-")
os.environ.update(
    HF_ENDPOINT="http://127.0.0.1:9",  # a leak trap: a call that forgets its endpoint fails
    HF_HOME=os.path.join(_HOME, "hf"),
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1",
    RECYCLE_ZOO=os.path.join(_HOME, "zoo"),
)
