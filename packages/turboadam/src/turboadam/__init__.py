"""AdamW that keeps its two moments in 7.25 bits for each parameter."""

from turboadam.adam import TurboAdam
from turboadam.convert import from_turboadam

__version__ = "1.0.0"

__all__ = ["TurboAdam", "from_turboadam"]
