"""Benchmarks: each prints ratios against a peer measured in the same run. Nothing here is a test."""
