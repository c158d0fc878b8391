"""Capacity: a simulator of the worker's batching with measured times, and the questions that it answers."""
