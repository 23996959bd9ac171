"""TurboAdam: AdamW with both moments in 7.25 bits per parameter."""

from turboadam.adam import TurboAdam
from turboadam.convert import from_turboadam

__version__ = "1.0.0"

__all__ = ["TurboAdam", "from_turboadam"]
