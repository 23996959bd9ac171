"""TurboAdam: AdamW with both moments in 5.5 bits per parameter, or 7.25."""

from turboadam.adam import TurboAdam
from turboadam.convert import from_turboadam

__version__ = "1.0.0"

__all__ = ["TurboAdam", "from_turboadam"]
