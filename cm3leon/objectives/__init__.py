"""What a training example asks of the model: corruption of ids, packing into blocks,
the loss (paper section 2.3)."""
