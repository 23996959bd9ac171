"""The umbrella of the optstate family: one install for all of it, and the ``optstate`` command.

Nothing of the family is imported here. The command loads what a subcommand needs when it runs, so
that ``pip install optstate`` stays a matter of seconds and ``optstate --help`` answers at once.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
