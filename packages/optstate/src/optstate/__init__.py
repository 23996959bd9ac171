"""The umbrella package of the optstate family, with the ``optstate`` command.

It imports no other package of the family. Each subcommand imports its own dependencies when it
runs, so that ``pip install optstate`` takes seconds and ``optstate --help`` answers at once.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
