"""Engines that run the graphs, the bundle that holds them, and the build that makes a bundle."""
