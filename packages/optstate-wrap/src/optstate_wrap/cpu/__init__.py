"""Step optimizers on the host for parameters on a device."""
