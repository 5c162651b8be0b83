"""Lichen: federated learning and foundation models, each making the other better."""

__version__ = "0.1.0"
