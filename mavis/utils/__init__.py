"""Files, Markdown and Optuna studies: what any floor may use."""
