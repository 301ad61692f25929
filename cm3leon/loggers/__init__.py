"""Loggers: where the figures, images and tables of trainings go.

base         the base class; several loggers as one, of which none can stop a training by failing
jsonl        lines of JSON in the run's folder, which status, reports and studies read
tensorboard  files for TensorBoard
pictures     images as PNG files, to be looked at while a stage trains
wandb, mlflow, trackio    services, each in a process of its own (process.py, served by child.py)
"""
