"""Distillation: one critic that learns what several say of the candidates."""
