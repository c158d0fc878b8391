"""State of one generation: schedule, calls, cached features, feature predictions and output corrections."""
