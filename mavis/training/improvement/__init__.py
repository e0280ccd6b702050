"""Improvement: iterated KL-regularised policy improvement of a critic."""
