"""The reference's operations as loops in C: recorded, lowered, emitted, built."""
