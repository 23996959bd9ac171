"""``optstate demo``: a small transformer learns real text, once with each optimizer.

In the order in which the command uses them, the modules are: `settings` (the options), `data` (the
text), `model` (the network), `names` and `optimizers` (names to classes), `train` (one run),
`record` and `memory` (its results), `compare` (all runs), `report` (the table and the JSON), `plot`
(the picture) and `output` (the files). `command` checks the options and calls them.
"""
