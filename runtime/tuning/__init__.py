"""``offcut tune``: find which UNet calls are full or skipped, and fit how the shallow ones predict cached features."""
