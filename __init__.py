"""offcut: DeepCache for compiled engines."""
