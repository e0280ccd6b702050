"""The small language model of a value-model critic: reading, caching, fusing and adapting it."""
