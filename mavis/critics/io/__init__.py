"""Saving and loading critics: folders, model cards and the hub."""
