"""Evaluation of a model by its samples: prompts, judges, metrics, and the report. See docs/evaluation.md."""

from .run import PARTS, Settings, evaluate

__all__ = ["PARTS", "Settings", "evaluate"]
