"""Applications over the public names of localdepth."""
