"""Distillation: one critic learns the values of several."""
