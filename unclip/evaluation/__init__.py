"""Measuring a model by what it draws: prompts, judges, metrics, and the report. See docs/evaluation.md."""

from .run import PARTS, Settings, evaluate

__all__ = ["PARTS", "Settings", "evaluate"]
