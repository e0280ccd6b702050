"""Files, Markdown tables and Optuna studies, for use on every floor."""
