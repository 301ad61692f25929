"""A plugin that teaches: an objective, a task, a decoder and an experiment; docs/plugins.md walks
through it.

    objective.py      fill_in_the_middle   what the model learns: another order of the same tokens
    task.py           infill_middle        what it is asked for, in the form that the objective trains
    decoder.py        min_p                how the answer's tokens are drawn
    experiment.yaml                        a run with all three: experiment=fill_in_the_middle

All modules of this folder are imported as they are found: nothing lists them. To make your own,
copy the folder, or put one like it anywhere and name its path in an experiment: `plugins:
[path/to/folder]`.
"""
