"""Measuring what a model does: metrics, protocols and the report."""
