"""Protocols: fixed prompts, what their answers are compared with,
and the figures that come of it."""
