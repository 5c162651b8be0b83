"""Writes a run's merged model in fewer bits, behind a gate on what that costs."""
