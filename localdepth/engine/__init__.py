"""Engines: run a model file behind one seam (see ``base``)."""
