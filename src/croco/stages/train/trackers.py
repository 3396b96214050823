"""Trackers of training, as transformers knows them (`runtime.trackers`): which there are, and where they write."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from transformers.integrations import INTEGRATION_TO_CALLBACK

from croco.errors import UserError


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise UserError for a tracker that transformers does not know or that is not installed."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"runtime.trackers names {name!r}, expected some of {known}")
        if find_spec(name) is None:
            raise UserError(
                f"runtime.trackers names {name!r}, which is not installed here, expected its package"
            )


@contextmanager
def tensorboard_in(folder: Path) -> Iterator[None]:
    """Where transformers looks for a place to log to: by itself it would log into the scratch folder."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:  # a person's own choice
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        del os.environ[name]
