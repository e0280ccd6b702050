"""Hyperparameter sweeps: the runs of one, collected in a table and a plot."""
