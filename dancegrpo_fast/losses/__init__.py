"""Losses over what a rollout drew."""
