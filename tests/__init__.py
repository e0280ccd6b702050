"""Tests of mavis; a package, because some distributions install one of the same name that would be imported instead."""
