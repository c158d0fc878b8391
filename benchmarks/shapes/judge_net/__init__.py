"""The judge network, which finds the objects in an image and measures distances between images."""
