"""A critic as a folder and on the hub."""
