"""Growth of latency and memory with the work, and of exports and builds with the model, with fitted exponents."""
