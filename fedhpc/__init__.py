"""fedhpc: federated customization of large models as an HPC program.

    run = fedhpc.run("mine.yaml", ranks=3)      # or a mapping, or a Config; a Run with DataFrames comes back
    run = fedhpc.open_run("runs/mine")          # one that is on disk
    model = fedhpc.load("runs/mine/adapter")    # what it exported: model.generate(["..."])

The names below are imported on first use, so that `import fedhpc` costs nothing. The classes are those that a plugin
derives from (fedhpc.registry says where a plugin may lie).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: public name -> the module that has it.
_MODULES = {
    "run": "fedhpc.api",
    "open_run": "fedhpc.api",
    "load_config": "fedhpc.api",
    "load": "fedhpc.customized",
    "Run": "fedhpc.api",
    "Config": "fedhpc.config",
    "UserError": "fedhpc.errors",
    "Method": "fedhpc.methods.base",
    "Attack": "fedhpc.attacks.base",
    "Aggregator": "fedhpc.server.aggregators.base",
    "Preaggregator": "fedhpc.server.preaggregators.base",
    "ServerOptimizer": "fedhpc.server.optimizers.base",
    "ClientOptimizer": "fedhpc.training.optimizers.base",
    "Transform": "fedhpc.updates.transforms.base",
    "Objective": "fedhpc.objectives.base",
    "Metric": "fedhpc.evaluation.metrics.base",
    "Partitioner": "fedhpc.data.partitioners.base",
    "Schedule": "fedhpc.participation.schedules.base",
    "Devices": "fedhpc.participation.devices.base",
    "Tracker": "fedhpc.results.trackers.base",
}

__all__ = [*_MODULES]

if TYPE_CHECKING:
    from fedhpc.api import Run as Run
    from fedhpc.api import load_config as load_config
    from fedhpc.api import open_run as open_run
    from fedhpc.api import run as run
    from fedhpc.attacks.base import Attack as Attack
    from fedhpc.config import Config as Config
    from fedhpc.customized import load as load
    from fedhpc.data.partitioners.base import Partitioner as Partitioner
    from fedhpc.errors import UserError as UserError
    from fedhpc.evaluation.metrics.base import Metric as Metric
    from fedhpc.methods.base import Method as Method
    from fedhpc.objectives.base import Objective as Objective
    from fedhpc.participation.devices.base import Devices as Devices
    from fedhpc.participation.schedules.base import Schedule as Schedule
    from fedhpc.results.trackers.base import Tracker as Tracker
    from fedhpc.server.aggregators.base import Aggregator as Aggregator
    from fedhpc.server.optimizers.base import ServerOptimizer as ServerOptimizer
    from fedhpc.server.preaggregators.base import Preaggregator as Preaggregator
    from fedhpc.training.optimizers.base import ClientOptimizer as ClientOptimizer
    from fedhpc.updates.transforms.base import Transform as Transform


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fedhpc' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
