"""Scores and times of models."""
