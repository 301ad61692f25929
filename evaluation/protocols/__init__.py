"""Protocols: fixed items, what their answers are compared with, and the figures that result."""
