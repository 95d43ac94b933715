"""The benchmark: what a store reaches, beside what its server and the bare driver reach.

Absolute figures hold for one machine; so what compares speeds is a ratio between two things of one
run, on one server, measured in turns where one does not have to end before the other. The
original's own goals are times of single calls, in ms. `load` makes what is stored, `bare` is the
opponent, `suite` measures, `year` is the long form, `report` tells.
"""
