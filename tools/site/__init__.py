"""What a person does once on a new cluster: `python3 jobs/init_site.py`, which starts command.py.

SLURM's words (slurm.py) + a node's (node_facts.py) -> facts -> a few questions (questions.py)
-> the cluster's file (cluster_file.py), tried with SLURM and stored by the cluster's name
"""
