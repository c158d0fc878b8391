"""The build of a bundle: one request in, one bundle out."""
