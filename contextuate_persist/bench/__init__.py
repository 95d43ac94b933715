"""The benchmark: what a store reaches, beside what its server and the bare driver reach.

Absolute figures hold for one machine; so every figure that a goal is about is a ratio between two
things that were measured in turns, in one run, on one server. `load` makes what is stored, `bare`
is the opponent, `suite` measures, `year` is the long form, `report` tells.
"""
