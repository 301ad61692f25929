"""From logits to tokens: guidance, processors, grammar,
the batched cached engine (paper section 3.2)."""
