"""Influence-based explanations of segmentation networks by their training data, as resumable Ray batch jobs.

For every region that a network predicts (slice × class): which training regions pushed the network toward that
prediction, and which pushed against it. The method is that of Torda et al. (arXiv 2405.12222), an extension of TracIn
(Pruthi et al., arXiv 2002.08484). Read ``vocabulary``, ``regions``, ``gradients``, ``influence`` and ``stages`` first.

>>> run = ray_tracin.open_run("my-run")                 # doctest: +SKIP
>>> run.influence("train")[0, 5]                        # doctest: +SKIP
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "open_run"]


def __getattr__(name: str) -> Any:
    # Opened when asked for: the core alone needs neither Zarr nor Parquet, and imports in a fraction of the time.
    if name in ("Run", "open_run"):
        return getattr(import_module("ray_tracin.runs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
