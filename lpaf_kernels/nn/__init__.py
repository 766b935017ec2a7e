"""Modules that store and apply compressed linear layers."""
