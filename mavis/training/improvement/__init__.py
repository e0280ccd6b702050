"""Training a critic: iterated KL-regularised policy improvement."""
