"""Metrics of generated images: `evaluate` as a library call, `evaluator.py` as a command."""

from evaluations.evaluation import Evaluation, Result, evaluate
from evaluations.settings import Settings

__all__ = ["Evaluation", "Result", "Settings", "evaluate"]
