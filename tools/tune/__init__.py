"""`jobs/submit_grpo.py --tune`: layouts of a job by the time that a model of its cost predicts.

cost.py      seconds of a step: arithmetic, memory and networks
command.py   the search over layouts that fit, and the table
"""
