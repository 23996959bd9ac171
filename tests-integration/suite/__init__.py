"""The law suite: every public optimizer, by itself, against every law that applies to it.

``discovery`` finds the optimizers, ``configurations`` gives them arguments and states their bounds,
``cases`` lists optimizer x point x law, and ``exclusions`` says what does not apply, and why.
"""
