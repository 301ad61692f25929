"""Loggers: where the figures, images and tables of trainings go.

base         what a logger is; several of them as one, where none that fails stops a training
jsonl        lines of JSON in the run's folder, which status, reports and studies read
tensorboard  files for TensorBoard
pictures     images as PNG files, to be looked at while a stage trains
wandb, mlflow, trackio    services, each in a process of its own (process.py, served by child.py)
"""
