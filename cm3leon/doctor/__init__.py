"""What `python -m cm3leon.run doctor` looks at and measures.

findings.py     a line of its report: good, warning or wrong, and what to do
machine.py      software, GPUs and their links, SLURM, the disk
files.py        whether a file system keeps what checkpoints and locks need
nccl.py         sums between the GPUs of this machine
figures.py      what is measured, beside its goal and what others reach
parts.py        the table of measurements; each runs in a process of its own, so that none takes the rest with it
page.py         findings and figures as a page and as JSON

The measurements are files of their own (hardware, attention, training, images, data). What they time is called by
`benchmarks/`, too.
"""
