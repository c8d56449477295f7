"""Objectives: functions that fill `.grad` and return what they saw."""
