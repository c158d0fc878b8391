"""``offcut bench controlnet``: quality and speed with a ControlNet that is skipped on shallow calls."""
