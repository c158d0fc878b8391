"""``offcut tune``: choose which UNet calls are full or skipped, and fit the feature predictions of shallow calls."""
