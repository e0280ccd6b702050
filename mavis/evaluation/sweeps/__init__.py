"""The runs of a hyperparameter sweep, gathered into one table and one plot."""
