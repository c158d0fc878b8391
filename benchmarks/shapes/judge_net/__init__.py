"""The judge network: reads a picture of a scene back, and gives the features of two distances between pictures."""
