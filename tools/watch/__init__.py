"""What a person does with runs: `python3 jobs/runs.py`, which starts commands.py.

Nothing of a run depends on this package. It does not import torch.

    commands.py     the command line
    status.py       what a run does and has done, from its files and from slurm_queue.py
    run_logs.py     the logs of all processes as one
    report.py       report.html with the data of a run
    control.py      a shell in a run, a tunnel to it, its end, its upload
"""
