"""Places trainer ranks, engines and the rollout: in one process, under torchrun or on Ray."""
