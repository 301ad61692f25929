"""Models: ids to logits, and nothing else (paper section 3.1)."""
