"""Models that run many clients at once: frozen parts held once, trainable parts with a client axis."""
