"""One training loop for every stage: optimizer, schedule, checkpoints, exact resume."""
