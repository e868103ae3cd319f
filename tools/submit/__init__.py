"""Submits a GRPO run, or rehearses it: `python jobs/submit_grpo.py`, which starts grpo.py.

Nothing of a run depends on this package. It does not import torch.
"""
