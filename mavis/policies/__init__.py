"""What is asked of a causal LM: its embeddings, devices, fingerprint, hidden states, configuration and loading."""
