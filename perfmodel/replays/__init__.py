"""Published systems, replayed: their figures, and what the model says of the same runs."""
