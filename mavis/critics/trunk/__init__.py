"""The language model of a value-model critic: incremental reading, cache, fused forward pass, adapters."""
