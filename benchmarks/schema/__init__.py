"""The sections of ``result.json``, in one module for each benchmark."""
