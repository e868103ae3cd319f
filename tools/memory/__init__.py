"""What a run holds on a GPU, on a node and on disk: arithmetic and its errors.

parts.py         the parts by name, which a plan shows
states.py        weights, gradients, optimizer state
activations.py   what backward functions keep, by the kernels of the layers
host.py          main memory and checkpoints
estimate.py      all of it together
checks.py        what is refused
plan.py          a layout that has the memory
command.py       the same for a run that is not submitted
"""
