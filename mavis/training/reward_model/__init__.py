"""Reward models: sequence classifiers that learn from preference pairs which response is better."""
