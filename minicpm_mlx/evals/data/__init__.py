"""Evaluation data: the files of each task, found, downloaded and read."""
