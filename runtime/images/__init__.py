"""One image or video from a bundle: request, generation, comparison, pictures, time by component, and the demo."""
