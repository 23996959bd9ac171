"""``optstate demo``: a small transformer learns real text, once with each optimizer.

The files read in the order the command works: `settings` (what was asked), `data` (the text),
`model` (the network), `names` and `optimizers` (names to classes), `train` (one run), `record` and
`memory` (what it did and held), `compare` (all runs), `report` (the table and the JSON), `plot`
(the picture) and `output` (the files). `command` checks the request and puts them together.
"""
