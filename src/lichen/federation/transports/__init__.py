"""Transports of a federation: which one a kit is for, and the one that needs gRPC alone."""
