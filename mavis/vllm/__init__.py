"""Adapters for serving engines; each is imported by its own name, because each needs its engine."""
