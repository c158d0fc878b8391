"""The judge network, which reads an image of a scene, and whose features give two distances between images."""
