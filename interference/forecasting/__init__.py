"""Forecasts of interference before training: updates that do not exist yet, and what they will do to every domain."""
