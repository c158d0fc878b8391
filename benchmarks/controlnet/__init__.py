"""``offcut bench controlnet``: cost and gain of skipping a ControlNet on shallow calls."""
