"""Plugins: every package and module in this folder is imported as `cm3leon.plugins.<name>` and
registers components."""
