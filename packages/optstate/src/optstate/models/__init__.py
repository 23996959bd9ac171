"""Shapes of models, of which optimizers are built on the meta device: nothing is allocated."""
