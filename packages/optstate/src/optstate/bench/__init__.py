"""``optstate bench``: times optimizer steps on this machine, beside those of other libraries."""
