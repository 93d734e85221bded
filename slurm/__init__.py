"""Machines: job scripts. Says nothing about the model."""
