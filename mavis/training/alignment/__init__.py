"""Alignment: a fine-tuned copy of a policy, for comparisons and alignment vectors."""
