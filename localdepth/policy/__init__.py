"""Policies: decide the depth of a query, and when to stop."""
