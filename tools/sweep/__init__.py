"""Sweeps: runs that differ in some fields and in their seeds, submitted as one SLURM job array.

sweep.yaml -> spec.py: elements -> command.py: each is planned and checked, then one array
-> RUN_ROOT/<sweep>/: table.py's sweep.json, and a run directory for each element
-> compare.py: a row for each setting, with the mean over its seeds
"""
