"""The state of a parameter: its layout in memory, how it is built, checked, saved and loaded."""
