"""Coupled slices, read off the solved axes; why, how much they cost."""

from .solution import Group as Group
