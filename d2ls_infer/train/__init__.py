"""Training: optional, and imported by nothing else."""
