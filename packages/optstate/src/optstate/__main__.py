"""``python -m optstate`` is the ``optstate`` command."""

from optstate.cli import app

if __name__ == "__main__":
    app(prog_name="optstate")
