"""Comparisons: several connectors over the same frozen parts, trained alike and read together."""
