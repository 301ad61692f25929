"""What `python -m cm3leon.run doctor` checks and measures.

    findings.py  a line of its report: good, warning or wrong, and what to do
    machine.py   software, GPUs and their links, SLURM, cores and memory
    files.py     whether a file system does what checkpoints and locks rely on
    nccl.py      sums between the GPUs of this machine
    figures.py   a measured number, its goal, and what other projects reach
    parts.py     the measurements; each has its own process, so that a crash ends one alone
    page.py      findings and figures as a page and as JSON

The findings are lines such as

    good     files, locked: a second process is refused a lock (flock)
    warning  faiss: 1.13.0 is built without GPU support: search and index training run on the CPU
             -> install faiss-gpu or its cuVS build in place of faiss-cpu

The measurements are files of their own (hardware, attention, training, images, data). `benchmarks/`
times the same functions.
"""
