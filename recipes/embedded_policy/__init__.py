"""How the embedded policy was made."""
