"""Who runs where: trainer ranks, engines and the rollout manager, in one process, under torchrun, or as Ray
actors.
"""
