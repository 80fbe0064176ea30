"""Weights of a real model."""

from __future__ import annotations

from pathlib import Path

import pytest


def find_smollm2() -> Path:
    """SmolLM2's file. `make test` installs it; a test is skipped where somebody else has not."""
    from sapper.models.errors import ModelError
    from sapper.models.locate import find_model

    try:
        return find_model("smollm2")
    except ModelError as error:
        pytest.skip(str(error))
