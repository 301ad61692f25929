"""A plugin to learn from: an objective, a task, a decoder and an experiment; docs/plugins.md walks
through it.

    objective.py      fill_in_the_middle   what the model learns: another order of the same tokens
    task.py           infill_middle        what it is asked, in the form that the objective trains
    decoder.py        min_p                how the answer's tokens are drawn
    experiment.yaml                        a run with all three: experiment=fill_in_the_middle

All modules of this folder are imported when they are found; they are listed nowhere. To make your
own plugin, copy the folder, or put one like it anywhere and name its path in an experiment:
`plugins: [path/to/folder]`.
"""
