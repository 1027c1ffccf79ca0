"""Fixtures that every test may use. Nothing here imports torch."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of photographs and benchmark files that MMALIGN_REAL names."""
    folder = os.environ.get("MMALIGN_REAL", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set MMALIGN_REAL to a folder of photographs and benchmark files")
    return Path(folder)


@pytest.fixture(autouse=True)
def untouched_logger() -> None:
    """Each test finds the logger as importing leaves it, whatever an earlier one configured."""
    logger = logging.getLogger("mmalign")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
