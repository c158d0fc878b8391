"""Sections of ``result.json``, one module for each benchmark."""
