"""Moved: training stands in `spacompiler.train.loop`; this name goes with the next release."""

import warnings

from .train.loop import Training as Training
from .train.loop import train as train

warnings.warn("spacompiler.training is spacompiler.train.loop now", DeprecationWarning,
              stacklevel=2)
