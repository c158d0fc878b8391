"""``offcut bench controlnet``: what it costs and saves that a ControlNet rests on shallow calls."""
