"""``offcut tune``: which calls are full, and how the others predict the cached features, found on the model itself."""
