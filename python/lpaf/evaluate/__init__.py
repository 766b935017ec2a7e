"""Scoring, timing and spectra of models."""
