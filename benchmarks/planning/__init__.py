"""Capacity planning by simulation with measured times."""
