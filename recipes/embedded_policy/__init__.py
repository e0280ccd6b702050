"""The recipe of the embedded policy: corpus, tokenizer and pretraining."""
