"""One training loop for every stage: optimizer, schedule, checkpoints, exact resume.

Read `trainer.py` first; `checkpoint.py` is how a training survives a kill, `outcome.py` why the
device never waits.
"""
