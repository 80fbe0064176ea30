"""For the whole suite: every compilation verifies its IR after every pass."""

from __future__ import annotations

import os

os.environ.setdefault("SAPPER_VERIFY", "1")
