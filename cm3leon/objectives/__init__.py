"""What a model is trained on: corruption of ids, packing into blocks, the loss (paper section 2.3).

Read `cm3.py` first, then `packing.py` and `block_stream.py`.
"""
