"""A bundle on disk: its manifest, opening and checking, committing and pruning."""
