"""`mavis <command> [hydra overrides]`: which command runs which Hydra app."""
