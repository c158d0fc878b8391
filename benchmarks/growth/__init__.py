"""How latency and memory grow with the work, and exports and builds with the model: measured, with fitted exponents."""
