"""State of one generation: schedule, calls, cached features, their prediction, and correction of the outputs."""
