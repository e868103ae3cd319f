"""nanoslime: GRPO on a SLURM cluster, Megatron first. See README.md for the map of the house."""
