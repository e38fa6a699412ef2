"""What can be said of GGUF files, and done to them, without quantizing: each module a function from files to a value.

summary.py     what a file holds: model, types, layers
lint.py        the table of faults, and what of them a file has
checks_*.py    the checks themselves; scan.py reads every byte for those of the data
repair.py      the fixes that are safe
edit.py        keys set, removed, renamed, and the undoing of it
diff.py        how two files differ
statistics.py  statistics of every weight, of a checkpoint or a file
network.py     where in the network a tensor stands
"""
