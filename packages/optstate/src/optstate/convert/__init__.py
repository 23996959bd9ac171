"""``optstate convert``: checkpoints of optimizers from one library to another."""
