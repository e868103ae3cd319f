"""Places trainer ranks and engines: in one process, under torchrun or on Ray."""
