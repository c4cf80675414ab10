"""Training: the loop, the objectives of the stages, plans, plots and the export of a trained pipeline."""

from typing import Any

from ..io.moved import attribute


def __getattr__(name: str) -> Any:
    return attribute(__name__, name)  # a module in version 0.1
